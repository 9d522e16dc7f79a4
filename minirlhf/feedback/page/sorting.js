// Ranking and sorting: digits name texts from the top down, or they are dragged.
import { button, el, shown } from "./elements.js";

export function ranking(ctx) {
  ctx.ask(
    "Which is best, which is next?",
    "Press the numbers from the best on, or drag. One number and Enter: only the best.",
  );
  sorted(
    ctx,
    "best",
    "worst",
    (order, tied, placed) => {
      if (placed === 1) return ctx.submit({ best: order[0] });
      const tiers = [];
      order.forEach((i, place) =>
        tied.has(place) ? tiers[tiers.length - 1].push(i) : tiers.push([i]),
      );
      ctx.submit({ ranking: tiers.map((tier) => (tier.length > 1 ? tier : tier[0])) });
    },
    true,
  );
}

export function trace(ctx) {
  ctx.ask(
    `Sort by “${ctx.q.feature}”, the least first`,
    "Press the numbers from the least on, or drag.",
  );
  sorted(
    ctx,
    "least",
    "most",
    (order, _, placed) => placed === order.length && ctx.submit({ order }),
    false,
  );
}

function sorted(ctx, first, last, finish, ties) {
  const n = ctx.q.texts.length;
  let order = ctx.q.texts.map((_, i) => i),
    placed = 0;
  const tied = new Set();
  const items = ctx.q.texts.map((pieces, i) => {
    const grip = el(
      "button",
      {
        type: "button",
        class: "grip",
        onclick: () => dragged || put(i),
        onpointerdown: (e) => drag(e, i),
        "aria-label": `Text ${i + 1}: put it next`,
      },
      el("kbd", {}, String(i + 1)),
    );
    ctx.key(String(i + 1), () => put(i));
    return el("li", { class: "card" }, grip, shown(pieces), el("span", { class: "rank" }));
  });
  const list = el("ol", { class: "list" });
  const done = button(ctx, "Done", ["enter"], () => ready() && finish(order, tied, placed), "main");
  const ready = () => placed === n || (ties && placed === 1);
  function paint() {
    list.append(...order.map((i) => items[i]));
    order.forEach((i, place) => {
      const ends = place === 0 ? `, ${first}` : place === n - 1 ? `, ${last}` : "";
      const rank = place < placed ? (tied.has(place) ? "as above" : `${place + 1}${ends}`) : "";
      items[i].querySelector(".rank").textContent = rank;
      items[i].classList.toggle("chosen", place < placed);
    });
    done.disabled = !ready();
  }
  function put(i) {
    if (order.indexOf(i) < placed) return;
    order = [...order.slice(0, placed), i, ...order.slice(placed).filter((j) => j !== i)];
    placed = placed + 1 === n - 1 ? n : placed + 1;
    paint();
  }
  function tie() {
    const place = placed - 1;
    if (place < 1) return;
    tied.has(place) ? tied.delete(place) : tied.add(place);
    paint();
  }
  let dragged = false;
  function drag(event, i) {
    dragged = false;
    const from = event.clientY;
    const move = (e) => {
      if (Math.abs(e.clientY - from) < 6 && !dragged) return;
      dragged = true;
      items[i].classList.add("dragged");
      const others = order.filter((j) => j !== i);
      const above = others.filter((j) => {
        const box = items[j].getBoundingClientRect();
        return box.top + box.height / 2 < e.clientY;
      });
      order = [...others.slice(0, above.length), i, ...others.slice(above.length)];
      tied.clear();
      placed = n;
      paint();
    };
    const end = () => {
      items[i].classList.remove("dragged");
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", end);
      removeEventListener("pointercancel", end);
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  }
  ctx.stage.append(list);
  ctx.actions.append(done);
  if (ties) ctx.actions.append(button(ctx, "The last two are equal", ["="], tie));
  ctx.actions.append(
    button(ctx, "Start over", ["backspace"], () => {
      placed = 0;
      tied.clear();
      paint();
    }),
  );
  paint();
}
