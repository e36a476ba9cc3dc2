// The page's state and what changes it; view.js makes the document of it, draw.js the pictures.

import { cardOf, eventsOf, takeEvent } from "./answers.js";
import { dark, drawPane } from "./draw.js";
import { keptOf, numKept } from "./selection.js";
import { render } from "./vendor/lit-html.js";
import { pageView } from "./view.js";

const content = await answerOf(fetch("api/page"));
const hasPatches = content.no_patches === "";
const DEFAULTS = { picture: content.pictures[0].id, budget: content.budget, methods: ["mmtok", ""] };
// What the link holds.
const chosen = { ...DEFAULTS, question: "" };
const state = {
  chosen,
  pictures: new Map(content.pictures.map((picture) => [picture.id, picture])),
  numTokens: null, // of the chosen picture; null until they are known
  panes: [], // one a method: what was asked last, its image, and the selection that was found, or why there is none
  server: { name: "", message: "The page is loading.", waited_s: 0, log: "", can_restart: false },
  asked: "Ask, and the answers unpruned and at this budget stand here, with their times to first token.",
  cards: [],
  isAsking: false,
  isPlaying: false,
  isDropping: false,
  answersStatus: "",
  linkMessage: "",
  pictureMessage: "",
  restartError: "",
};

function update(changes) {
  Object.assign(state, changes);
  document.body.className = state.server.name + (state.isDropping ? " dropping" : "");
  render(pageView(content, state, act), document.body);
  document.querySelectorAll("canvas").forEach((canvas, idx) => drawPane(canvas, state.panes[idx], chosen.budget));
}

function choose(changes) {
  Object.assign(chosen, changes);
  update();
  writeLinkSoon();
}

function soon(work, delay_ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, delay_ms);
  };
}

// Asking the page's program.

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return fetch(path, { method: "POST", signal, headers, body: JSON.stringify(body) });
}

async function answerOf(request) {
  const response = await request;
  if (response.ok) return response.json();
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error ?? `The page's program refused this (HTTP ${response.status}).`);
}

// The link: everything that was chosen, behind the # that browsers keep to themselves.

async function openLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const [budget, picture] = [link.get("budget") ?? "", link.get("picture") ?? DEFAULTS.picture];
  const methods = [link.get("method"), link.get("compare")];
  Object.assign(chosen, {
    picture,
    question: link.get("question") ?? state.pictures.get(picture)?.questions.at(4)?.[0] ?? "",
    budget: /^(all|[1-9]\d{0,5}|(?!0+%)\d{1,2}(\.\d+)?%|100%)$/.test(budget) ? budget : DEFAULTS.budget,
    methods: methods.map((name, idx) => (content.methods.includes(name) ? name : DEFAULTS.methods[idx])),
  });
  let pictureMessage = "";
  if (!state.pictures.has(picture)) {
    try {
      state.pictures.set(picture, await answerOf(fetch(`api/pictures/${encodeURIComponent(picture)}`)));
    } catch (error) {
      pictureMessage = error.message;
      chosen.picture = DEFAULTS.picture;
    }
  }
  update({ numTokens: null, pictureMessage });
  selectAll();
  writeLinkSoon();
}

function writeLink() {
  const link = new URLSearchParams({ picture: chosen.picture, question: chosen.question, budget: chosen.budget });
  link.set("method", chosen.methods[0]);
  if (chosen.methods[1]) link.set("compare", chosen.methods[1]);
  history.replaceState(null, "", `#${link}`);
}
// Browsers let a page change its address a hundred times in some seconds.
const writeLinkSoon = soon(writeLink, 250);

async function copyLink() {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    update({ linkMessage: "Copied." });
  } catch {
    update({ linkMessage: "Copy it from the address bar." });
  }
}

// What is kept: asked once for a method whose budgets are nested, for each budget of another.

function selectAll() {
  const wanted = chosen.methods[1] ? 2 : 1;
  state.panes.splice(wanted).forEach((pane) => pane.stop.abort());
  while (state.panes.length < wanted) state.panes.push({ image: null, found: null, message: "" });
  state.panes.forEach(select);
}

async function select(pane, idx) {
  pane.stop?.abort();
  pane.stop = new AbortController();
  const { signal } = pane.stop;
  const body = { picture: chosen.picture, question: chosen.question, method: chosen.methods[idx] };
  pane.isBusy = true;
  update();
  const image = pane.picture === body.picture ? pane.image : await imageOf(body.picture);
  let [found, message] = [null, ""];
  try {
    if (hasPatches) found = await selectionOf(body, signal);
  } catch (error) {
    message = error.message;
  }
  if (signal.aborted) return;
  Object.assign(pane, body, { image, found, message, isBusy: false });
  update({ numTokens: found?.tokens ?? state.numTokens });
}

async function imageOf(picture) {
  const image = new Image();
  image.src = `api/pictures/${encodeURIComponent(picture)}/seen.jpg`;
  await image.decode().catch(() => undefined);
  return image.naturalWidth ? image : null;
}

async function selectionOf(body, signal) {
  const found = (asked) => answerOf(post("api/selection", { ...body, ...asked }, signal));
  if (content.nested.includes(body.method)) return found();
  state.numTokens ??= (await found({ method: "random" })).tokens;
  const budget = numKept(chosen.budget, state.numTokens);
  return { ...(await found({ budget })), budget };
}

const selectUnnestedSoon = soon(() => {
  state.panes.forEach((pane, idx) => !content.nested.includes(chosen.methods[idx]) && select(pane, idx));
}, 60);

function moveBudget(value) {
  const { numTokens } = state;
  choose({ budget: numTokens === null ? `${value}%` : Number(value) === numTokens ? "all" : String(value) });
  if (hasPatches) selectUnnestedSoon();
}

function chooseMethod(idx, name) {
  choose({ methods: chosen.methods.with(idx, name) });
  selectAll();
}

let playing = 0;
function play() {
  clearInterval(playing);
  update({ isPlaying: !state.isPlaying });
  if (!state.isPlaying) return;
  const last = numKept(chosen.budget, state.numTokens ?? 100);
  let next = 0;
  playing = setInterval(() => {
    next = Math.min(next + Math.max(1, Math.round(last / 60)), last);
    moveBudget(next);
    if (next === last) play();
  }, 120);
}

// Pictures and questions.

function choosePicture(id) {
  const picture = state.pictures.get(id);
  const [before, after] = [state.pictures.get(chosen.picture)?.questions ?? [], picture.questions];
  let { question, budget } = chosen;
  // A question of another scene goes with its scene; one that was typed stays.
  if (question === "" || before.some(([text]) => text === question)) {
    question = (after.find(([text]) => text === question) ?? after.at(4) ?? after[0] ?? ["What is in the image?"])[0];
  }
  const { numTokens } = state;
  if (numTokens !== null && budget !== "all") {
    budget = `${Math.max(1, Math.round((100 * numKept(budget, numTokens)) / numTokens))}%`;
  }
  Object.assign(state, { numTokens: null, pictureMessage: picture.note ? `The picture was ${picture.note}.` : "" });
  choose({ picture: id, question, budget });
  selectAll();
}

function chooseQuestion(question) {
  choose({ question });
  state.panes.forEach(select);
}

const selectSoon = soon(() => state.panes.forEach(select), 250);
function typeQuestion(question) {
  choose({ question });
  selectSoon();
}

async function addFile(file) {
  if (!file) return;
  update({ pictureMessage: `Reading ${file.name}.` });
  try {
    const picture = await answerOf(fetch("api/pictures", { method: "POST", body: file }));
    state.pictures.set(picture.id, { ...picture, name: file.name });
    choosePicture(picture.id);
    document.getElementById("pictures").lastElementChild.scrollIntoView({ block: "nearest" });
  } catch (error) {
    update({ pictureMessage: `${file.name}: ${error.message}` });
  }
}

function addChosenFile({ target }) {
  addFile(target.files[0]);
  target.value = "";
}

// Answers.

async function ask(event) {
  event.preventDefault();
  if (state.isAsking || state.server.name !== "ready") return;
  const { picture, question, budget } = chosen;
  const { name, questions } = state.pictures.get(picture) ?? { name: "the picture", questions: [] };
  const right = questions.find(([text]) => text === question)?.[1];
  const kept = state.numTokens === null ? null : numKept(budget, state.numTokens);
  const cards = [cardOf("Unpruned")];
  const runs = [{ budget: "all" }];
  state.panes.forEach((pane, idx) => {
    const method = chosen.methods[idx];
    const isDrawn = pane.found && !pane.isBusy && pane.question === question && kept < state.numTokens;
    const drawn = isDrawn ? keptOf(pane.found, budget) : null;
    cards.push(cardOf(`${method}, ${kept === null ? budget : `${kept} tokens`}`, drawn));
    runs.push({ budget: kept === null ? budget : String(kept), method });
  });
  const about = `“${question}” about ${name}.${right ? ` The right answer is: ${right}.` : ""}`;
  update({ isAsking: true, asked: about, cards, answersStatus: "Asking." });
  try {
    const response = await post("api/answers", { picture, question, runs });
    if (!response.ok) await answerOf(response);
    for await (const event of eventsOf(response)) showEvent(event);
  } catch (error) {
    cards.forEach((card, run) => card.isBusy && showEvent({ run, error: error.message }));
  }
  for (const card of cards) card.isBusy = false;
  update({ isAsking: false });
}

function showEvent(event) {
  const answersStatus = takeEvent(state.cards[event.run ?? 0], event) ?? state.answersStatus;
  update({ answersStatus });
  if ("error" in event) checkState();
}

// The server's state.

async function checkState() {
  let server;
  try {
    server = await answerOf(fetch("api/state"));
  } catch {
    const message = "The program behind this page has ended. Start mmtok demo --page again: this page goes on by itself.";
    server = { name: "stopped", message, log: "", can_restart: false };
  }
  showServer(server);
}

function showServer(server) {
  const isNews = server.message !== state.server.message;
  update({ server, restartError: isNews ? "" : state.restartError });
}

async function watchState() {
  await checkState();
  setTimeout(watchState, state.server.name === "ready" ? 2000 : 700);
}

async function restart() {
  try {
    showServer(await answerOf(post("api/restart", {})));
  } catch (error) {
    update({ restartError: error.message });
  }
}

const act = { addChosenFile, ask, chooseMethod, choosePicture, chooseQuestion, copyLink, moveBudget, play, restart, typeQuestion };
document.body.replaceChildren();
update();
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    update({ isDropping: kind === "dragenter" || kind === "dragover" });
  });
}
addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files[0];
  if (file) addFile(file);
  else update({ pictureMessage: "What was dropped is no file: save the picture first, and drop that." });
});
addEventListener("hashchange", openLink);
dark.addEventListener("change", () => update());
new ResizeObserver(() => update()).observe(document.getElementById("panes"));
watchState();
await openLink();
