// What questions are built of. Texts come in pieces, words with the space before them; they enter
// the page as text nodes alone, never as HTML. Places in a text are counted in characters as Python
// does, not in the halves of UTF-16.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const characters = (text) => [...text].length;
export const letter = (i) => "ABC"[i];

export function shown(pieces) {
  const text = pieces.join("");
  if (!text.trim()) return el("p", { class: "text empty" }, "(empty)");
  return el("p", { class: "text", dir: "auto" }, text);
}

const CAPS = {
  arrowleft: "←",
  arrowright: "→",
  arrowup: "↑",
  arrowdown: "↓",
  enter: "Enter",
  " ": "Space",
  backspace: "⌫",
};
const cap = (name) => CAPS[name] || name.toUpperCase();

// A button with its keys, the first of which it shows
export function button(ctx, label, keys, action, kind = "") {
  for (const name of keys) ctx.key(name, action);
  const caps = keys
    .slice(0, 1)
    .map((name) => el("kbd", {}, name.startsWith("ctrl+") ? "Ctrl Enter" : cap(name)));
  const node = el("button", { type: "button", class: kind, onclick: action }, label, ...caps);
  node.setAttribute("aria-keyshortcuts", keys.map(cap).join(" "));
  return node;
}

export function cards(...children) {
  return el("div", { class: "cards" }, ...children);
}

// Two answers side by side; extra() is said along
export function compared(ctx, content, extra) {
  const say = (said) => () => ctx.submit({ ...said, ...extra() });
  const sides = ctx.q.texts.map((pieces, i) =>
    el(
      "article",
      { class: "card", "aria-label": "Answer " + letter(i) },
      el("div", { class: "name" }, "Answer " + letter(i)),
      content(pieces, i),
      button(
        ctx,
        `${letter(i)} is better`,
        [
          ["a", "1", "arrowleft"],
          ["b", "2", "arrowright"],
        ][i],
        say({ ranking: i ? [1, 0] : [0, 1] }),
        "main",
      ),
    ),
  );
  ctx.stage.append(cards(...sides));
  ctx.actions.append(
    button(ctx, "As good as each other", ["t", "="], say({ ranking: [[0, 1]] })),
    button(ctx, "Both bad", ["x"], say({ ranking: [[0, 1]], both_bad: true })),
  );
}
