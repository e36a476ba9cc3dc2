// What is kept is asked once for a method whose budgets are nested, and drawn here as the slider moves.

const $ = (id) => document.getElementById(id);
const NUM_NUMBERED = 20;

const content = await (await fetch("api/page")).json();
const pictures = new Map(content.pictures.map((picture) => [picture.id, picture]));
const nested = new Set(content.nested);
const hasPatches = content.no_patches === "";
const chosen = { picture: content.pictures[0].id, question: "", budget: content.budget, methods: ["mmtok", ""] };
let numTokens = null; // of the chosen picture; null until they are known
let serverState = "";
let asking = false;

// Asking the page's program.

async function asked(path, body, signal) {
  const options = body === undefined ? { signal } : { method: "POST", signal, body: JSON.stringify(body) };
  if (body !== undefined) options.headers = { "Content-Type": "application/json" };
  return answerOf(await fetch(path, options));
}

async function answerOf(response) {
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ?? `The page's program refused this (HTTP ${response.status}).`);
  return answer;
}

// The link: everything that was chosen, behind the # that browsers keep to themselves.

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const methods = [link.get("method") ?? "mmtok", link.get("compare") ?? ""];
  chosen.methods = methods.map((name, idx) => (content.methods.includes(name) ? name : ["mmtok", ""][idx]));
  const budget = link.get("budget") ?? "";
  chosen.budget = /^(all|[1-9]\d{0,5}|(?!0+%)\d{1,2}(\.\d+)?%|100%)$/.test(budget) ? budget : content.budget;
  chosen.picture = link.get("picture") ?? content.pictures[0].id;
  chosen.question = link.get("question") ?? pictures.get(chosen.picture)?.questions.at(4)?.[0] ?? "";
}

function writeLink() {
  const link = new URLSearchParams({ picture: chosen.picture, question: chosen.question, budget: chosen.budget });
  link.set("method", chosen.methods[0]);
  if (chosen.methods[1]) link.set("compare", chosen.methods[1]);
  history.replaceState(null, "", `#${link}`);
}

// The budget: a number of tokens once it is known how many there are, a share before.

function numKept(total) {
  if (chosen.budget === "all") return total;
  const number = parseFloat(chosen.budget);
  return chosen.budget.endsWith("%") ? Math.max(1, Math.floor((number * total) / 100)) : Math.min(number, total);
}

function showBudget() {
  const slider = $("budget");
  slider.max = numTokens ?? 100;
  slider.value = numTokens === null ? numKept(100) : numKept(numTokens);
  const share = Math.round((100 * slider.value) / slider.max);
  const text = numTokens === null ? `${share}% of the image tokens` : `${slider.value} of ${numTokens} image tokens, ${share}%`;
  $("budget-text").textContent = text;
  const covered = panes[0]?.covered();
  slider.setAttribute("aria-valuetext", covered ? `${text}, ${covered} covered` : text);
}

function moveBudget(value) {
  chosen.budget = numTokens === null ? `${value}%` : Number(value) === numTokens ? "all" : String(value);
  panes.forEach((pane) => pane.moved());
  showBudget();
  writeLinkSoon();
}

function soon(work, delay_ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, delay_ms);
  };
}
// Browsers let a page change its address a hundred times in some seconds.
const writeLinkSoon = soon(writeLink, 250);

// A pane: one method's choice of patches on the picture.

class Pane {
  constructor(idx) {
    this.idx = idx;
    this.element = $("pane").content.firstElementChild.cloneNode(true);
    this.canvas = this.element.querySelector("canvas");
    this.note = this.element.querySelector(".note");
    this.found = null;
    this.image = null;
    this.stop = null;
    this.askSoon = soon(() => this.ask(), 60);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  get method() {
    return chosen.methods[this.idx];
  }

  // Another picture, question or method.
  async changed() {
    this.element.querySelector("h2").textContent = this.method;
    const picture = chosen.picture;
    if (this.shown !== picture) {
      this.shown = picture;
      this.found = null;
      this.image = null;
      const image = new Image();
      image.src = `api/pictures/${encodeURIComponent(picture)}/seen.jpg`;
      await image.decode().catch(() => undefined);
      if (this.shown !== picture) return;
      this.image = image.naturalWidth ? image : null;
    }
    this.ask();
  }

  moved() {
    if (hasPatches && !nested.has(this.method)) this.askSoon();
    else this.draw();
  }

  async ask() {
    this.stop?.abort();
    if (!hasPatches) return this.draw();
    this.stop = new AbortController();
    const { signal } = this.stop;
    const body = { picture: chosen.picture, question: chosen.question, method: this.method };
    this.element.setAttribute("aria-busy", "true");
    try {
      if (!nested.has(body.method)) {
        if (numTokens === null) numTokens = (await asked("api/selection", { ...body, method: "random" }, signal)).tokens;
        body.budget = numKept(numTokens);
      }
      this.found = { ...(await asked("api/selection", body, signal)), budget: body.budget, method: body.method };
      numTokens = this.found.tokens;
      this.tell("");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.found = null;
      this.tell(error.message, true);
    }
    this.element.removeAttribute("aria-busy");
    this.draw();
    showBudget();
  }

  tell(message, isWarning = false) {
    const draws = this.method === "random" ? "A server draws others, for each image, question and budget." : "";
    this.note.textContent = message || (hasPatches ? draws : content.no_patches);
    this.note.classList.toggle("warning", isWarning);
  }

  // The budget of what is drawn: a method that is not nested is drawn at the one that it was asked for.
  get count() {
    return this.found.budget ?? numKept(this.found.tokens);
  }

  // The kept patches in the order of picking.
  kept() {
    const { order, pickable, tokens } = this.found;
    const { count } = this;
    if (count < tokens) return order.slice(0, Math.min(count, pickable));
    const rest = Array.from({ length: tokens }, (_, token) => token);
    return [...order, ...rest.filter((token) => !order.includes(token))];
  }

  covered() {
    if (!this.found || this.found.smaller) return "";
    const { count } = this;
    const share = count >= this.found.tokens ? 1 : this.found.coverage[Math.min(count, this.found.coverage.length) - 1];
    return `${(100 * share).toFixed(1)}%`;
  }

  draw() {
    const { canvas, image, found } = this;
    const width = canvas.clientWidth;
    if (!image || !width) return;
    const scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round((canvas.width * image.naturalHeight) / image.naturalWidth);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (!found) return this.describe("", []);
    if (found.smaller) return this.drawSmaller(context);
    const kept = this.kept();
    drawKept(context, image, found.grid, kept, scale);
    const [, columns] = found.grid;
    const places = kept.slice(0, 5).map((token) => `row ${Math.floor(token / columns) + 1} column ${(token % columns) + 1}`);
    this.describe(places.length ? ` First picked: ${places.join(", ")}.` : "", kept);
    this.drawCurve();
  }

  // The whole picture with as many pixels as the smaller image has.
  drawSmaller(context) {
    const { canvas, image, found } = this;
    const [rows, columns] = found.smaller;
    const small = new OffscreenCanvas(columns * found.token_px, rows * found.token_px);
    small.getContext("2d").drawImage(image, 0, 0, small.width, small.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    this.describe(` The whole picture, made smaller to ${columns} by ${rows} tokens.`, { length: rows * columns });
    this.drawCurve();
  }

  describe(places, kept) {
    const name = pictures.get(chosen.picture)?.name ?? "Picture";
    const caption = this.element.querySelector("figcaption");
    if (!this.found) {
      for (const part of this.element.querySelectorAll(".curve, .axis")) part.toggleAttribute("hidden", true);
      this.canvas.setAttribute("aria-label", `${name}, as the model sees it. No patches are shown.`);
      return caption.replaceChildren();
    }
    const covered = this.covered();
    const number = document.createElement("strong");
    number.textContent = `${kept.length} of ${this.found.tokens}`;
    const words = document.createElement("span");
    words.textContent = `image tokens kept${covered ? `, ${covered} covered` : ""}`;
    const line = document.createElement("span");
    line.append(number, " ", words);
    caption.replaceChildren(line);
    this.canvas.dataset.kept = kept.length;
    const sentence = `${kept.length} of ${this.found.tokens} patches kept by ${this.method}.`;
    this.canvas.setAttribute("aria-label", `${name}: ${sentence}${places}`);
  }

  drawCurve() {
    const { coverage, tokens, smaller } = this.found;
    const curve = this.element.querySelector(".curve");
    // Of other methods only the coverage at this budget is known.
    const isKnown = !smaller && nested.has(this.found.method);
    curve.toggleAttribute("hidden", !isKnown);
    this.element.querySelector(".axis").hidden = !isKnown;
    if (!isKnown) return;
    const points = coverage.map((share, idx) => `${((100 * (idx + 1)) / tokens).toFixed(2)} ${(20 - 20 * share).toFixed(2)}`);
    curve.querySelector("path").setAttribute("d", `M0 20L${points.join("L")}`);
    const place = ((100 * numKept(tokens)) / tokens).toFixed(2);
    curve.querySelector("line").setAttribute("x1", place);
    curve.querySelector("line").setAttribute("x2", place);
  }
}

// Kept patches clear, the rest dimmed; groups of neighbours outlined, the first picks numbered.
function drawKept(context, image, [rows, columns], kept, scale) {
  const { width, height } = context.canvas;
  const isKept = new Set(kept);
  const box = (token) => {
    const edges = [(token % columns) / columns, Math.floor(token / columns) / rows];
    const [left, top] = [Math.round(edges[0] * width), Math.round(edges[1] * height)];
    return [left, top, Math.round((edges[0] + 1 / columns) * width) - left, Math.round((edges[1] + 1 / rows) * height) - top];
  };
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  context.fillStyle = isDark ? "rgba(20,24,29,0.78)" : "rgba(251,251,250,0.8)";
  context.fillRect(0, 0, width, height);
  context.save();
  context.beginPath();
  for (const token of kept) context.rect(...box(token));
  context.clip();
  context.drawImage(image, 0, 0, width, height);
  context.restore();
  context.beginPath();
  for (const token of kept) {
    const [left, top, wide, high] = box(token);
    const column = token % columns;
    const sides = [
      [isKept.has(token - columns), left, top, left + wide, top],
      [isKept.has(token + columns), left, top + high, left + wide, top + high],
      [column > 0 && isKept.has(token - 1), left, top, left, top + high],
      [column < columns - 1 && isKept.has(token + 1), left + wide, top, left + wide, top + high],
    ];
    for (const [isInside, ...line] of sides) {
      if (isInside) continue;
      context.moveTo(line[0], line[1]);
      context.lineTo(line[2], line[3]);
    }
  }
  context.strokeStyle = isDark ? "#e7eaee" : "#1d232c";
  context.lineWidth = 1.5 * scale;
  context.stroke();
  context.textAlign = "center";
  context.textBaseline = "middle";
  kept.slice(0, NUM_NUMBERED).forEach((token, idx) => {
    const [left, top, wide, high] = box(token);
    const radius = Math.min(Math.max(0.27 * Math.min(wide, high), 7.5 * scale), 0.48 * Math.min(wide, high), 14 * scale);
    const [x, y] = [left + radius + scale, top + radius + scale];
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = "#ffb000";
    context.fill();
    if (radius < 6 * scale) return;
    context.fillStyle = "#1c1e22";
    context.font = `600 ${1.15 * radius}px system-ui, sans-serif`;
    context.fillText(String(idx + 1), x, y + 0.06 * radius);
  });
}

const panes = [];

function showPanes() {
  const wanted = chosen.methods[1] ? 2 : 1;
  document.querySelector(".view").classList.toggle("two", wanted === 2);
  while (panes.length > wanted) panes.pop().element.remove();
  while (panes.length < wanted) {
    panes.push(new Pane(panes.length));
    $("panes").append(panes.at(-1).element);
  }
  panes.forEach((pane) => {
    pane.tell("");
    pane.changed();
  });
}

// Pictures and questions.

function addThumb(picture) {
  const label = document.createElement("label");
  label.className = "thumb";
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "picture", value: picture.id });
  const image = Object.assign(document.createElement("img"), { alt: "" });
  image.src = `api/pictures/${encodeURIComponent(picture.id)}/small.jpg`;
  const name = Object.assign(document.createElement("span"), { textContent: picture.name });
  label.append(radio, image, name);
  $("pictures").append(label);
  radio.addEventListener("change", () => choosePicture(picture.id));
}

function choosePicture(id) {
  const before = pictures.get(chosen.picture)?.questions ?? [];
  const picture = pictures.get(id);
  // A question of another scene goes with its scene; one that was typed stays.
  if (chosen.question === "" || before.some(([text]) => text === chosen.question)) {
    chosen.question = (picture.questions.find(([text]) => text === chosen.question) ?? picture.questions.at(4) ?? picture.questions[0] ?? ["What is in the image?"])[0];
  }
  const share = numTokens === null ? null : numKept(numTokens) / numTokens;
  if (share !== null && chosen.budget !== "all") chosen.budget = `${Math.max(1, Math.round(100 * share))}%`;
  chosen.picture = id;
  numTokens = null;
  $("picture-message").textContent = picture.note ? `The picture was ${picture.note}.` : "";
  showChosen();
}

function showSuggestions() {
  const questions = pictures.get(chosen.picture)?.questions ?? [];
  $("suggestions").hidden = questions.length === 0;
  $("suggestions").replaceChildren(
    ...questions.map(([text]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.setAttribute("aria-pressed", String(text === chosen.question));
      button.addEventListener("click", () => {
        chosen.question = text;
        $("question").value = text;
        questionChanged();
      });
      return button;
    }),
  );
}

function questionChanged() {
  for (const button of $("suggestions").children) {
    button.setAttribute("aria-pressed", String(button.textContent === chosen.question));
  }
  panes.forEach((pane) => pane.ask());
  writeLinkSoon();
}

async function addFile(file) {
  if (!file) return;
  $("picture-message").textContent = `Reading ${file.name}.`;
  try {
    const picture = await answerOf(await fetch("api/pictures", { method: "POST", body: file }));
    picture.name = file.name;
    pictures.set(picture.id, picture);
    addThumb(picture);
    choosePicture(picture.id);
    $("pictures").lastElementChild.scrollIntoView({ block: "nearest" });
  } catch (error) {
    $("picture-message").textContent = `${file.name}: ${error.message}`;
  }
}

function showChosen() {
  for (const radio of document.querySelectorAll("[name=picture]")) radio.checked = radio.value === chosen.picture;
  $("question").value = chosen.question;
  chosen.methods.forEach((name, idx) => ($(`method-${idx}`).value = name));
  showSuggestions();
  showPanes();
  showBudget();
  writeLink();
}

async function openLink() {
  readLink();
  numTokens = null;
  $("picture-message").textContent = "";
  if (!pictures.has(chosen.picture)) {
    try {
      const picture = await asked(`api/pictures/${encodeURIComponent(chosen.picture)}`);
      pictures.set(picture.id, picture);
      addThumb(picture);
    } catch (error) {
      $("picture-message").textContent = error.message;
      chosen.picture = content.pictures[0].id;
    }
  }
  showChosen();
}

// Answers.

function makeCard(title) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.querySelector("h3").textContent = title;
  card.setAttribute("aria-busy", "true");
  $("cards").append(card);
  return card;
}

function addFact(card, name, value, isLead = false) {
  const term = Object.assign(document.createElement("dt"), { textContent: name });
  const fact = Object.assign(document.createElement("dd"), { textContent: value, className: isLead ? "lead" : "" });
  card.querySelector("dl").append(term, fact);
}

function showEvent(cards, event) {
  if (event.waiting) {
    $("answers-status").textContent = "Another tab is asking: this one waits for its turn.";
    cards[0].querySelector(".note").textContent = $("answers-status").textContent;
    return;
  }
  const card = cards[event.run];
  const text = card.querySelector(".answer");
  if ("piece" in event) {
    text.textContent += event.piece;
  } else if ("answer" in event) {
    const { text: whole, ttft_ms, num_prompt_tokens, num_image_tokens, num_cached_tokens } = event.answer;
    text.textContent = whole.trim() || "(an empty answer)";
    card.querySelector(".note").textContent = "";
    addFact(card, "time to first token", `${ttft_ms < 100 ? ttft_ms.toFixed(1) : Math.round(ttft_ms)} ms`, true);
    addFact(card, "prompt tokens", num_prompt_tokens);
    if (num_image_tokens !== null) addFact(card, "of the image", num_image_tokens);
    if (num_cached_tokens) addFact(card, "of them from a cache", num_cached_tokens);
    $("answers-status").textContent = `${card.querySelector("h3").textContent}: ${text.textContent}.`;
  } else if ("account" in event) {
    card.removeAttribute("aria-busy");
    showAccount(card, event.account);
  } else if ("error" in event) {
    card.removeAttribute("aria-busy");
    text.textContent = event.error;
    text.classList.add("error");
    $("answers-status").textContent = event.error;
    checkState();
  }
}

// What the server says that it kept, held against what is drawn; a server that computes in bfloat16 rounds otherwise.
function showAccount(card, account) {
  const image = account?.images?.[0];
  if (!image) return;
  if (image.tokens_kept < image.tokens_in) addFact(card, "image tokens in", image.tokens_in);
  if (image.coverage !== null) addFact(card, "covered, as the server says", `${(100 * image.coverage).toFixed(1)}%`);
  const note = card.querySelector(".note");
  if (image.is_fallback) note.textContent = "The server could not select: it kept evenly spaced tokens.";
  const drawn = card.drawn;
  if (!drawn || image.method !== "mmtok" || image.coverage === null) return;
  const differs = drawn.kept !== image.tokens_kept || Math.abs(drawn.coverage - image.coverage) > 0.02;
  if (differs) {
    note.textContent = "The server kept other tokens than are drawn here. Is the checkpoint here the one that it serves?";
    note.classList.add("warning");
  }
}

async function ask() {
  if (asking || serverState !== "ready") return;
  asking = true;
  showAskButton();
  const { picture, question } = chosen;
  const right = pictures.get(picture)?.questions.find(([text]) => text === question)?.[1];
  const about = pictures.get(picture)?.name ?? "the picture";
  $("asked").textContent = `“${question}” about ${about}.${right ? ` The right answer is: ${right}.` : ""}`;
  $("cards").replaceChildren();
  const cards = [makeCard("Unpruned")];
  const runs = [{ budget: "all" }];
  for (const pane of panes) {
    const kept = numTokens === null ? null : numKept(numTokens);
    const card = makeCard(`${pane.method}, ${kept === null ? chosen.budget : `${kept} tokens`}`);
    if (pane.found?.coverage.length && kept < numTokens) {
      const count = Math.min(kept, pane.found.pickable);
      card.drawn = { kept: count, coverage: pane.found.coverage[count - 1] };
    }
    cards.push(card);
    runs.push({ budget: kept === null ? chosen.budget : String(kept), method: pane.method });
  }
  $("answers-status").textContent = "Asking.";
  try {
    const response = await fetch("api/answers", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ picture, question, runs }),
    });
    if (!response.ok) await answerOf(response);
    const lines = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await lines.read(); !part.done; part = await lines.read()) {
      const complete = (rest + part.value).split("\n");
      rest = complete.pop();
      complete.forEach((line) => showEvent(cards, JSON.parse(line)));
    }
  } catch (error) {
    cards.forEach((card, run) => card.hasAttribute("aria-busy") && showEvent(cards, { run, error: error.message }));
  }
  cards.forEach((card) => card.removeAttribute("aria-busy"));
  asking = false;
  showAskButton();
}

function showAskButton() {
  $("ask").disabled = asking || serverState !== "ready";
  $("ask").textContent = asking ? "Asking" : "Ask";
}

// The server's state.

async function checkState() {
  let state;
  try {
    state = await asked("api/state");
  } catch {
    const message = "The program behind this page has ended. Start mmtok demo --page again: this page goes on by itself.";
    state = { name: "stopped", message, log: "", can_restart: false };
  }
  showState(state);
}

function showState(state) {
  const isNews = state.name !== serverState || state.message !== $("state-text").textContent;
  serverState = state.name;
  $("waited").textContent = state.name === "starting" ? `${Math.round(state.waited_s)} s` : "";
  if (!isNews) return;
  document.body.classList.remove("starting", "ready", "stopped");
  document.body.classList.add(state.name);
  $("state-text").textContent = state.message;
  $("starting").hidden = state.name !== "starting";
  const isStopped = state.name === "stopped";
  $("state").hidden = isStopped;
  $("trouble-text").textContent = isStopped ? state.message : "";
  $("restart").hidden = !state.can_restart;
  $("log").hidden = !state.log;
  $("log").querySelector("pre").textContent = state.log;
  $("trouble").hidden = !isStopped;
  showAskButton();
}

async function watchState() {
  await checkState();
  setTimeout(watchState, serverState === "ready" ? 2000 : 700);
}

// What the user does.

let isPlaying = 0;
function play() {
  clearInterval(isPlaying);
  if (isPlaying) {
    isPlaying = 0;
    $("play").textContent = "Play";
    return;
  }
  const last = Number($("budget").value);
  let next = 0;
  $("play").textContent = "Stop";
  isPlaying = setInterval(() => {
    next += Math.max(1, Math.round(last / 60));
    moveBudget(Math.min(next, last));
    if (next >= last) play();
  }, 120);
}

$("model").textContent = content.model;
$("about-patches").hidden = !hasPatches;
$("play").hidden = !hasPatches;
$("model-notes").textContent = content.notes;
$("privacy").textContent = content.privacy;
content.pictures.forEach(addThumb);
for (const [idx, select] of [$("method-0"), $("method-1")].entries()) {
  select.append(...content.methods.map((name) => new Option(name, name)));
  select.addEventListener("change", () => {
    chosen.methods[idx] = select.value;
    showPanes();
    writeLink();
  });
}
$("budget").addEventListener("input", () => moveBudget($("budget").value));
$("play").addEventListener("click", play);
const questionSoon = soon(questionChanged, 250);
$("question").addEventListener("input", () => {
  chosen.question = $("question").value;
  questionSoon();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("file").addEventListener("change", () => {
  addFile($("file").files[0]);
  $("file").value = "";
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragenter" || kind === "dragover");
  });
}
addEventListener("drop", (event) => {
  const file = event.dataTransfer?.files[0];
  if (file) addFile(file);
  else $("picture-message").textContent = "What was dropped is no file: save the picture first, and drop that.";
});
$("restart").addEventListener("click", async () => {
  try {
    showState(await asked("api/restart", {}));
  } catch (error) {
    $("trouble-text").textContent = error.message;
  }
});
$("link").addEventListener("click", async () => {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    $("link-message").textContent = "Copied.";
  } catch {
    $("link-message").textContent = "Copy it from the address bar.";
  }
});
addEventListener("hashchange", openLink);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panes.forEach((pane) => pane.draw()));
watchState();
await openLink();
