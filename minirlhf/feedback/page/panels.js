// What stands beside the questions: guidelines, quality, learning, keys. Texts are text nodes.
import { el } from "./elements.js";

// Headings, lists and paragraphs of a Markdown file; everything else stays as it was written
function guidelines(panel, about) {
  const nodes = [el("h2", {}, "Guidelines")];
  for (const line of (about.guidelines || "There are none: --guidelines FILE.md shows some.").split(
    "\n",
  )) {
    const [, mark, text] = line.match(/^(#+ |[-*] |\d+\. )?(.*)$/);
    const last = nodes[nodes.length - 1];
    if (mark?.startsWith("#")) nodes.push(el("h3", {}, text));
    else if (mark)
      (last.tagName === "UL" ? last : nodes[nodes.push(el("ul")) - 1]).append(
        el("li", {}, mark.match(/\d/) ? mark + text : text),
      );
    else if (!text.trim()) nodes.push(el("p"));
    else if (last.tagName === "P") last.append((last.textContent ? " " : "") + text);
    else nodes.push(el("p", {}, text));
  }
  panel.replaceChildren(...nodes.filter((node) => node.textContent));
}

function table(rows) {
  return el(
    "table",
    {},
    ...rows.map(([name, value]) =>
      el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)),
    ),
  );
}

const percent = (x) => `${Math.round(100 * x)} %`;
const none = "–";

function quality(panel, { quality: q }) {
  const [share, low, high] = q.first;
  const rows = [
    ["Labels", String(q.labels)],
    ["Seconds a label, median", q.seconds === null ? none : q.seconds.toFixed(1)],
    [
      "First side chosen",
      share === null ? none : `${percent(share)} (${percent(low)} to ${percent(high)})`,
    ],
    ["Same answer when asked again", q.repeated ? `${q.agreed} of ${q.repeated}` : none],
  ];
  const kinds = Object.entries(q.kinds).map(([kind, n]) => [kind, String(n)]);
  const parts = [el("h2", {}, "Quality"), table(rows)];
  if (kinds.length) parts.push(el("h2", {}, "Kinds"), table(kinds));
  if (q.agreement.length)
    parts.push(
      el("h2", {}, "Agreement between raters"),
      el("p", { class: "soft" }, "Krippendorff’s alpha: 1 is perfect, 0 is chance"),
      table(
        q.agreement.map((a) => [
          `${a.kind}, ${a.raters} raters, ${a.units} texts`,
          a.alpha === null ? none : a.alpha.toFixed(2),
        ]),
      ),
    );
  if (q.runs.length)
    parts.push(
      el("h2", {}, "Strength"),
      el("p", { class: "soft" }, "Bradley and Terry, with 95 % intervals"),
      table(
        q.runs.map(({ run, strength: [x, a, b] }) => [
          run,
          `${x.toFixed(2)} (${a.toFixed(2)} to ${b.toFixed(2)})`,
        ]),
      ),
    );
  panel.replaceChildren(...parts);
}

function learning(panel, { learning: state }, work) {
  const button = (label, name, off) => {
    const node = el(
      "button",
      { type: "button", class: name === "train" ? "main" : "", onclick: () => work(name) },
      label,
    );
    node.disabled = off || Boolean(state.job);
    return node;
  };
  const parts = [
    el("h2", {}, "Learning"),
    el(
      "div",
      { class: "row" },
      button("Train now", "train", false),
      button("Write with it", "write", !state.fit),
    ),
  ];
  if (state.job)
    parts.push(
      el("p", { role: "status" }, state.job === "train" ? "Training" : "Writing"),
      el("progress", {
        max: String(state.total || 1),
        value: String(state.done),
        "aria-label": state.job,
      }),
    );
  if (state.error) parts.push(el("p", { role: "alert" }, state.error));
  if (state.fit) parts.push(...fitted(state));
  if (state.written.length) {
    parts.push(el("h2", {}, "Written with it"));
    for (const row of state.written)
      parts.push(
        el(
          "div",
          { class: "pair" },
          el("p", { class: "text", dir: "auto" }, row.prompt),
          text("before", row.old, row.old_score),
          text("now", row.new, row.new_score),
        ),
      );
  }
  panel.replaceChildren(...parts);
}

function text(name, content, score) {
  return el(
    "div",
    {},
    el("div", { class: "soft" }, `${name}, score ${score === null ? none : score.toFixed(2)}`),
    el("p", { class: "text", dir: "auto" }, content || "(empty)"),
  );
}

function fitted({ fit, saved }) {
  const parts = [
    el("p", { class: "soft" }, `${fit.labels} labels, ${fit.seconds} s. Left in ${saved}`),
  ];
  if (fit.accuracy.length)
    parts.push(el("h2", {}, "Held-out accuracy by number of labels"), chart(fit.accuracy));
  if (fit.disagreements.length) parts.push(el("h2", {}, "Where it disagrees with you"));
  for (const { prompt, texts, best } of fit.disagreements) {
    const first = Array.isArray(best) ? best[0] : best;
    parts.push(
      el(
        "div",
        { class: "pair" },
        el("p", { class: "text", dir: "auto" }, prompt),
        ...texts.map((t, i) => text(i === first ? "your choice" : "other", t.text, t.score)),
      ),
    );
  }
  return parts;
}

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, props, content = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.textContent = content;
  return node;
}

// Accuracy from a half to 1 over the number of labels
function chart(points) {
  const [w, h, left, bottom] = [320, 150, 34, 22],
    most = points[points.length - 1][0] || 1;
  const x = (n) => left + (n / most) * (w - left - 12),
    y = (a) => 8 + (1 - Math.min(1, Math.max(0, a))) * (h - bottom - 8);
  const svg = shape("svg", {
    class: "chart",
    viewBox: `0 0 ${w} ${h}`,
    role: "img",
    "aria-label": points.map(([n, a]) => `${n} labels: ${a.toFixed(2)}`).join("; "),
  });
  for (const a of [0, 0.5, 1])
    svg.append(
      shape("line", { x1: left, x2: w, y1: y(a), y2: y(a) }),
      shape("text", { x: 4, y: y(a) + 4 }, a.toFixed(1)),
    );
  svg.append(
    shape("path", { d: points.map(([n, a], i) => `${i ? "L" : "M"}${x(n)} ${y(a)}`).join("") }),
  );
  for (const [n, a] of points)
    svg.append(
      shape("circle", { cx: x(n), cy: y(a), r: 3.5 }),
      shape("text", { x: x(n) - 8, y: h - 5 }, String(n)),
    );
  return svg;
}

const KEYS = [
  ["U", "undo, as often as you like"],
  ["S", "skip"],
  ["R", "say why; Enter or Esc leaves"],
  ["G", "guidelines"],
  ["Q", "quality"],
  ["L", "learning"],
  ["?", "this list"],
  ["Tab", "from one thing to the next"],
];

function listed(panel) {
  panel.replaceChildren(
    el("h2", {}, "Keys"),
    el("p", { class: "soft" }, "Answers have their keys on them."),
    el(
      "table",
      {},
      ...KEYS.map(([name, what]) =>
        el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, name)), el("th", {}, what)),
      ),
    ),
  );
}

export const panels = { guidelines, quality, learning, keys: listed };
