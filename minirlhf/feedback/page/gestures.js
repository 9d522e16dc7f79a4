// One function for each kind of feedback. It builds the question in ctx.stage and ctx.actions,
// binds keys by ctx.key(name, action), and hands what was said to ctx.submit.
import { button, cards, compared, el, shown } from "./elements.js";
import { ranking, trace } from "./sorting.js";
import { estop, importance, intertemporal } from "./words.js";

function comparison(ctx) {
  if (ctx.q.texts.length > 2) return ranking(ctx);
  ctx.ask("Which answer is better?");
  compared(ctx, shown, () => ({}));
}

function critique(ctx) {
  const n = ctx.q.levels,
    thumbs = n === 2;
  ctx.ask(thumbs ? "Is this good?" : "How good is this?");
  ctx.stage.append(el("article", { class: "card" }, shown(ctx.q.texts[0])));
  for (let i = 0; i < n; i++) {
    const ends = i === 0 ? " worst" : i === n - 1 ? " best" : "";
    const label = thumbs ? ["👎 Bad", "👍 Good"][i] : `${i + 1}${ends}`;
    const keys = thumbs
      ? [
          ["arrowdown", "1"],
          ["arrowup", "2"],
        ][i]
      : [String(i + 1)];
    ctx.actions.append(button(ctx, label, keys, () => ctx.submit({ level: i })));
  }
}

function social(ctx) {
  ctx.ask("What face do you make?");
  ctx.stage.append(el("article", { class: "card" }, shown(ctx.q.texts[0])));
  const faces = [
    ["🙁", "frown"],
    ["😐", "neutral"],
    ["🙂", "smile"],
  ].map(([face, reaction], i) => {
    const node = button(ctx, face, [String(i + 1)], () => ctx.submit({ reaction }));
    node.setAttribute("aria-label", reaction);
    return node;
  });
  ctx.actions.append(el("div", { class: "faces row" }, ...faces));
}

function proxy(ctx) {
  ctx.ask(
    "What should count, and how much?",
    "The texts stand in the order that your weights give them.",
  );
  const weights = Object.fromEntries(ctx.q.features.map((name) => [name, 0]));
  const items = ctx.q.texts.map((pieces) =>
    el("li", { class: "card" }, shown(pieces), el("span", { class: "rank" })),
  );
  const list = el("ol", { class: "list" });
  const paint = () => {
    const scores = ctx.q.values.map((row) =>
      row.reduce((sum, x, f) => sum + x * weights[ctx.q.features[f]], 0),
    );
    const order = items.map((_, i) => i).sort((i, j) => scores[j] - scores[i]);
    list.append(...order.map((i) => items[i]));
    items.forEach((item, i) => {
      item.querySelector(".rank").textContent = scores[i].toFixed(1);
    });
    done.disabled = Object.values(weights).every((w) => w === 0);
  };
  const sliders = ctx.q.features.map((name) => {
    const output = el("output", {}, "0");
    const input = el("input", {
      type: "range",
      min: "-2",
      max: "2",
      step: "0.5",
      value: "0",
      "aria-label": name,
      oninput: () => {
        weights[name] = Number(input.value);
        output.textContent = input.value;
        paint();
      },
    });
    return el("label", {}, el("span", {}, name), input, output);
  });
  const done = button(
    ctx,
    "Done",
    ["enter"],
    () => done.disabled || ctx.submit({ weights }),
    "main",
  );
  ctx.stage.append(el("div", { class: "sliders" }, ...sliders), list);
  ctx.actions.append(done);
  paint();
  ctx.stage.querySelector("input").focus({ preventScroll: true });
}

function improvement(ctx) {
  ctx.ask("Make it better", "Edit the text until it is good.");
  const text = ctx.q.texts[0].join("");
  const area = el("textarea", {
    "aria-label": "The improved text",
    dir: "auto",
    spellcheck: "true",
  });
  area.value = text;
  const finish = () => area.value !== text && ctx.submit({ improved: area.value });
  const done = button(ctx, "Done", ["ctrl+enter"], finish, "main");
  area.addEventListener("input", () => {
    done.disabled = area.value === text;
  });
  done.disabled = true;
  ctx.key("e", () => area.focus());
  ctx.stage.append(area);
  ctx.actions.append(
    done,
    el(
      "span",
      { class: "soft typed" },
      "Esc leaves the text, ",
      el("kbd", {}, "E"),
      " goes back to it",
    ),
  );
  area.focus({ preventScroll: true });
}

function language(ctx) {
  ctx.ask("What should there be more of, or less?", "Said of the first text, beside the others.");
  const [first, ...others] = ctx.q.texts;
  ctx.stage.append(
    el("article", { class: "card" }, shown(first)),
    el("details", { open: "" }, el("summary", {}, "The others"), ...others.map(shown)),
  );
  const said = ctx.q.grammar.map((utterance, i) => {
    const name = `${i % 2 ? "shift+" : ""}${Math.floor(i / 2) + 1}`;
    const node = button(ctx, utterance, [name], () => ctx.submit({ utterance }));
    node.querySelector("kbd").textContent = name.replace("shift+", "⇧");
    return node;
  });
  ctx.stage.append(el("div", { class: "said" }, ...said));
}

function similarity(ctx) {
  ctx.ask("Which is least like the other two?");
  ctx.stage.append(
    cards(
      ...ctx.q.texts.map((pieces, i) =>
        el(
          "article",
          { class: "card" },
          shown(pieces),
          button(
            ctx,
            "The odd one",
            [String(i + 1), "abc"[i]],
            () => ctx.submit({ odd: i }),
            "main",
          ),
        ),
      ),
    ),
  );
}

export const gestures = {
  critique,
  comparison,
  intertemporal,
  proxy,
  social,
  improvement,
  language,
  estop,
  importance,
  trace,
  similarity,
};
