// The page: one question at a time, its answer, and panels beside it. An answer is kept until the
// server says that it is on the disk; sending it twice does nothing, so that it is sent until then.
import { el } from "./elements.js";
import { gestures } from "./gestures.js";
import { panels } from "./panels.js";

const $ = (id) => document.getElementById(id);
const tab = sessionStorage.tab || (sessionStorage.tab = Math.random().toString(36).slice(2));
let keys = {},
  leave = () => {},
  busy = true,
  since = 0,
  question = null,
  about = {},
  open = "",
  last = "",
  timer = 0;

async function call(name, body = {}) {
  const options = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, tab }),
  };
  const reply = await fetch(name, options);
  return read(reply);
}

async function look(name) {
  return read(await fetch(name));
}

async function read(reply) {
  if (reply.status === 404)
    throw new Error("This address is not valid any more: open the one that the server prints.");
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

// Sends until there is an answer; what cannot be mended by waiting is thrown
async function insist(name, body) {
  for (;;) {
    try {
      return await call(name, body);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      say("The server does not answer. What you said is kept here and sent again.", true);
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  }
}

function say(text, problem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", problem);
}

function show(found) {
  leave();
  keys = {};
  leave = () => {};
  question = found.question;
  last = found.last;
  const all = found.done + found.left;
  $("bar").max = all || 1;
  $("bar").value = found.done;
  $("count").textContent = `${about.rater} · ${found.done} answered, ${found.left} left`;
  for (const id of ["stage", "actions", "prompt", "how"]) $(id).replaceChildren();
  $("note").hidden = question === null;
  $("skip").disabled = question === null;
  $("prompt").hidden = !question?.prompt;
  if (question === null)
    return ask("That was all", "Every question has its answer. Undo goes back.");
  $("prompt").append(el("p", { class: "text", dir: "auto" }, question.prompt));
  $("note-name").textContent = question.kind === "language" ? "In your words:" : "Why?";
  $("note-text").value = "";
  $("title").focus({ preventScroll: true }); // where a screen reader goes on
  scrollTo(0, 0);
  gestures[question.kind]({
    q: question,
    stage: $("stage"),
    actions: $("actions"),
    ask,
    submit,
    key: (name, action) => {
      keys[name] = action;
    },
    leave: (action) => {
      leave = action;
    },
  });
  since = performance.now();
}

function ask(title, how = "") {
  $("title").textContent = title;
  $("how").textContent = how;
}

async function act(name, body, tell) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    sessionStorage.pending = JSON.stringify([name, body]);
    const found = await insist(name, body);
    delete sessionStorage.pending;
    show(found);
    say(tell(found));
    if (open) refresh();
  } catch (error) {
    delete sessionStorage.pending;
    say(error.message, true);
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

function submit(said) {
  const note = { [question.kind === "language" ? "remark" : "reason"]: $("note-text").value };
  const seconds = (performance.now() - since) / 1000;
  act("answer", { question: question.name, said, seconds, ...note }, told);
}

function told(found) {
  if (!found.written) return "This was answered already, in another tab.";
  return found.reveal.length
    ? "Saved. " + found.reveal.map((run, i) => `${"ABCDEFGHI"[i]}: ${run}`).join(" · ")
    : "Saved.";
}

const undo = () =>
  act("undo", { last }, (found) =>
    found.undone
      ? "Taken back: answer it again."
      : found.last
        ? "Another tab has answered meanwhile: press again to take that back."
        : "There is nothing to take back.",
  );
const skip = () => question && act("skip", { question: question.name }, () => "Skipped.");

// Panels

async function refresh() {
  clearTimeout(timer);
  try {
    const found = open === "guidelines" || open === "keys" ? about : await look("figures");
    if (open) panels[open]($("panel"), found, work);
    if (open === "learning" && found.learning.job) timer = setTimeout(refresh, 300);
  } catch (error) {
    say(error.message, true);
  }
}

async function work(name) {
  try {
    await call(name);
    refresh();
  } catch (error) {
    say(error.message, true);
  }
}

function toggle(name) {
  open = open === name ? "" : name;
  $("panel").hidden = !open;
  for (const node of document.querySelectorAll("[data-panel]"))
    node.setAttribute("aria-expanded", String(node.dataset.panel === open));
  $("panel").replaceChildren();
  if (open) refresh();
}

for (const node of document.querySelectorAll("[data-panel]"))
  node.addEventListener("click", () => toggle(node.dataset.panel));
$("undo").addEventListener("click", undo);
$("skip").addEventListener("click", skip);

// Keys

const everywhere = {
  u: undo,
  s: skip,
  g: () => toggle("guidelines"),
  q: () => toggle("quality"),
  "?": () => toggle("keys"),
  l: () => about.learns && toggle("learning"),
  r: () => $("note-text").focus(),
};

function pressed(event) {
  if (event.repeat || event.metaKey || event.altKey || event.isComposing) return;
  const writes = event.target.matches("textarea, input:not([type=range])");
  if (writes && event.key === "Escape") return event.target.blur();
  if (writes && event.target === $("note-text") && event.key === "Enter")
    return event.target.blur();
  let name = event.key.toLowerCase();
  if (event.ctrlKey) name = `ctrl+${name}`;
  else if (writes) return;
  else if (!keys[name] && event.shiftKey && event.code.startsWith("Digit"))
    name = `shift+${event.code.slice(5)}`; // where no such key is meant: = is one in some layouts
  // Words and grips have the space key; Enter ends the question
  const own = name === "enter" && keys.enter && event.target.matches(".word, .grip");
  const native = event.target.matches("button, summary") && [" ", "enter"].includes(name) && !own;
  const range = event.target.matches("input[type=range]") && name.startsWith("arrow");
  if (native || range || event.defaultPrevented) return;
  const action = keys[name] || everywhere[name];
  if (!action) return;
  event.preventDefault();
  action();
}

addEventListener("keydown", pressed);

async function begin() {
  try {
    about = await look("begin");
    document.querySelector("[data-panel=learning]").hidden = !about.learns;
    document.querySelector("[data-panel=guidelines]").hidden = !about.guidelines;
    const pending = sessionStorage.pending && JSON.parse(sessionStorage.pending);
    delete sessionStorage.pending;
    if (pending) await insist(...pending).catch((error) => say(error.message, true));
    show(await insist("question"));
    if (about.guidelines && innerWidth > 1000) toggle("guidelines");
    busy = false;
  } catch (error) {
    ask("This did not work");
    say(error.message, true);
  }
}

begin();
