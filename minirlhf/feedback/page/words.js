// Gestures on the words of a text: a curve over them, a stop, marks.
import { button, characters, compared, el } from "./elements.js";

// A column for each word, as high as the text is good so far
export function intertemporal(ctx) {
  ctx.ask(
    "How good is it so far, word by word?",
    "Draw across the columns, or move with ← → and raise with ↑ ↓.",
  );
  const pieces = ctx.q.texts[0],
    values = pieces.map(() => 0.5);
  let before = null;
  const columns = pieces.map((piece, i) =>
    el(
      "div",
      {
        class: "column",
        role: "slider",
        tabindex: i ? "-1" : "0",
        "aria-valuemin": "0",
        "aria-valuemax": "1",
        "aria-label": piece.trim() || "space",
        onkeydown: (e) => step(e, i),
      },
      el("div", { class: "well" }, el("div", { class: "fill" })),
      el("span", { class: "text", dir: "auto" }, piece.trim()),
    ),
  );
  const paint = (i) => {
    columns[i].querySelector(".fill").style.height = `${values[i] * 100}%`;
    columns[i].setAttribute("aria-valuenow", values[i]);
  };
  function set(i, value) {
    values[i] = Math.round(Math.min(1, Math.max(0, value)) * 100) / 100;
    paint(i);
  }
  function step(event, i) {
    const up = { ArrowUp: 0.1, ArrowDown: -0.1 }[event.key],
      along = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!up && !along) return;
    event.preventDefault();
    if (up) set(i, values[i] + up);
    const next = columns[i + along];
    if (next) {
      columns[i].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  }
  function draw(event) {
    if (!event.buttons) return;
    const i = columns.findIndex((column) =>
      column.contains(document.elementFromPoint(event.clientX, event.clientY)),
    );
    if (i < 0) return;
    const box = columns[i].querySelector(".well").getBoundingClientRect();
    const value = 1 - (event.clientY - box.top) / box.height;
    if (before && Math.abs(before.i - i) > 1) {
      // the pointer was quicker than its events
      const toward = Math.sign(i - before.i);
      for (let j = before.i + toward; j !== i; j += toward)
        set(j, before.value + ((value - before.value) * (j - before.i)) / (i - before.i));
    }
    set(i, value);
    before = { i, value };
  }
  const field = el(
    "div",
    {
      class: "curve",
      onpointermove: draw,
      onpointerdown: (e) => {
        before = null;
        e.preventDefault();
        draw(e);
        columns[0].closest("main").focus();
      },
    },
    ...columns,
  );
  ctx.stage.append(field);
  columns.forEach((_, i) => paint(i));
  ctx.actions.append(
    button(
      ctx,
      "Done",
      ["enter"],
      () => {
        let end = 0;
        const curve = pieces.map((piece, i) => [(end += characters(piece)), values[i]]);
        ctx.submit({ curve: curve.length > 1 ? curve : [[0, 0.5], ...curve] });
      },
      "main",
    ),
  );
  columns[0].focus({ preventScroll: true });
}

// Words that can be pressed; one of them has the focus, arrows move it
function words(pieces, press) {
  const nodes = pieces.map((piece, i) =>
    el(
      "button",
      {
        type: "button",
        class: "word",
        tabindex: i ? "-1" : "0",
        "aria-pressed": "false",
        onclick: (e) => press(i, e),
        onkeydown: (e) => move(e, i),
      },
      piece.trimStart(),
    ),
  );
  function move(event, i) {
    const next = nodes[i + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0)];
    if (!next || next === nodes[i]) return;
    event.preventDefault();
    event.stopPropagation();
    nodes[i].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  const space = (piece) => piece.slice(0, piece.length - piece.trimStart().length);
  const content = nodes.flatMap((node, i) => [space(pieces[i]), node]);
  return [el("span", { class: "words", dir: "auto" }, ...content), nodes];
}

export function estop(ctx) {
  ctx.ask(
    "Stop it where it goes wrong",
    "The text comes word by word. A click on a word moves the stop.",
  );
  const pieces = ctx.q.texts[0];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let read = still ? pieces.length : 0,
    timer = null,
    stopped = false;
  const [text, nodes] = words(pieces, (i) => halt(i + 1));
  const paint = () =>
    nodes.forEach((node, i) => {
      node.classList.toggle("hidden", i >= read && !stopped && timer !== null);
      node.classList.toggle("last", stopped && i === read - 1);
      node.setAttribute("aria-pressed", String(stopped && i >= read));
    });
  function halt(at) {
    clearInterval(timer);
    timer = null;
    stopped = true;
    read = at;
    ctx.ask("Stopped. Is this the place?", "Marked words are what went wrong. ← → move the stop.");
    ended();
  }
  function ended() {
    stop.hidden = true;
    done.hidden = false;
    done.firstChild.textContent = stopped ? "Stop here" : "It may run to its end";
    paint();
  }
  const shift = (by) => () => stop.hidden && halt(Math.min(pieces.length, Math.max(0, read + by)));
  const stop = button(ctx, "Stop", [" "], () => stop.hidden || halt(read), "main");
  const done = button(
    ctx,
    "It may run to its end",
    ["enter"],
    () => {
      if (done.hidden) return;
      ctx.submit({
        stop: stopped && read < pieces.length ? characters(pieces.slice(0, read).join("")) : null,
      });
    },
    "main",
  );
  ctx.key("arrowleft", shift(-1));
  ctx.key("arrowright", shift(1));
  ctx.stage.append(el("article", { class: "card" }, text));
  ctx.actions.append(stop, done);
  done.hidden = true;
  if (still) return ended();
  timer = setInterval(() => {
    read += 1;
    if (read >= pieces.length) {
      clearInterval(timer);
      timer = null;
      ended();
    }
    paint();
  }, 160);
  ctx.leave(() => clearInterval(timer));
  paint();
}

export function importance(ctx) {
  ctx.ask(
    "Which answer is better, and what mattered?",
    "Mark the words that made the difference, then choose.",
  );
  const marked = ctx.q.texts.map((pieces) => pieces.map(() => false));
  compared(
    ctx,
    (pieces, k) => {
      let painting = null;
      const [text, nodes] = words(
        pieces,
        (i, event) => event.detail === 0 && set(i, !marked[k][i]),
      );
      function set(i, value) {
        marked[k][i] = value;
        nodes[i].setAttribute("aria-pressed", String(value));
      }
      nodes.forEach((node, i) => {
        // a pointer marks what it is drawn over; the keys click
        node.addEventListener("pointerdown", (e) => {
          if (e.pointerType === "mouse" || e.pointerType === "pen" || e.pointerType === "touch") {
            painting = !marked[k][i];
            set(i, painting);
            if (node.hasPointerCapture?.(e.pointerId)) node.releasePointerCapture(e.pointerId);
          }
        });
        node.addEventListener("pointerenter", (e) => {
          if (e.buttons && painting !== null) set(i, painting);
        });
      });
      return text;
    },
    () => ({ marks: ctx.q.texts.map((pieces, k) => spans(pieces, marked[k])) }),
  );
}

function spans(pieces, marked) {
  const found = [];
  let end = 0;
  pieces.forEach((piece, i) => {
    const start = end + characters(piece) - characters(piece.trimStart());
    end += characters(piece);
    if (!marked[i] || start === end) return;
    if (i && marked[i - 1] && found.length) found[found.length - 1][1] = end;
    else found.push([start, end]);
  });
  return found;
}
