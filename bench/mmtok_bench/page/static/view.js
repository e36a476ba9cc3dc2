// The document that belongs to a state of the page. What the user does is told to `act`.

import { keptOf, numKept, percent } from "./selection.js";
import { html, nothing } from "./vendor/lit-html.js";

export function pageView(content, state, act) {
  const hasPatches = content.no_patches === "";
  return html`${headerView(content, state, act)}
<main>
${formView(state, act)}
<section class=${state.chosen.methods[1] ? "view two" : "view"} aria-label="What is kept">
${budgetView(state, act, hasPatches)}
<div class="methods">
<label>Method<select id="method-0" @change=${(event) => act.chooseMethod(0, event.target.value)}>${optionsView(content.methods, state.chosen.methods[0])}</select></label>
<label>Compare with<select id="method-1" @change=${(event) => act.chooseMethod(1, event.target.value)}>${optionsView(["", ...content.methods], state.chosen.methods[1])}</select></label>
</div>
<div id="panes">${state.panes.map((pane, idx) => paneView(pane, state.chosen.methods[idx], content, state))}</div>
${answersView(state)}
</section>
</main>
<footer>
<p id="privacy">${content.privacy}</p>
<p id="model-notes">${content.notes}</p>
<p id="about-patches" ?hidden=${!hasPatches}>Patches are numbered in the order of picking. <em>Covered</em> is the share of MMTok’s objective, question and image together, that the kept tokens reach; it is the same measure for every method.</p>
<p>A time to first token is of one request, after one like it that is not timed. Each request has a cache salt of its own, so that it is computed in full, image encoder included, and one is sent at a time.</p>
</footer>`;
}

function headerView(content, { server, restartError, linkMessage }, act) {
  const [isStarting, isStopped] = [server.name === "starting", server.name === "stopped"];
  return html`<header>
<h1>What a budget keeps</h1>
<p id="model">${content.model}</p>
<p id="state" role="status" ?hidden=${isStopped}><span class="dot" aria-hidden="true"></span><span id="state-text">${server.message}</span> <span id="waited" aria-hidden="true">${isStarting ? `${Math.round(server.waited_s)} s` : ""}</span></p>
<p class="link"><button type="button" id="link" @click=${act.copyLink}>Copy link</button> <span id="link-message" role="status">${linkMessage}</span></p>
<progress id="starting" aria-label="The server is starting" ?hidden=${!isStarting}></progress>
<div id="trouble" role="alert" ?hidden=${!isStopped}>
<p id="trouble-text">${isStopped ? restartError || server.message : ""}</p>
<button type="button" id="restart" ?hidden=${!server.can_restart} @click=${act.restart}>Restart the server</button>
<details id="log" ?hidden=${!server.log}><summary>The end of its log</summary><pre tabindex="0" role="region" aria-label="The end of the server's log">${server.log}</pre></details>
</div>
</header>`;
}

function formView({ chosen, pictures, server, isAsking, pictureMessage }, act) {
  const questions = pictures.get(chosen.picture)?.questions ?? [];
  return html`<form id="form" aria-label="Picture and question" @submit=${act.ask}>
<fieldset>
<legend>Picture</legend>
<div id="pictures" tabindex="-1">${[...pictures.values()].map(
    ({ id, name }) => html`<label class="thumb"><input type="radio" name="picture" value=${id} .checked=${id === chosen.picture} @change=${() => act.choosePicture(id)}><img alt="" src=${`api/pictures/${encodeURIComponent(id)}/small.jpg`}><span>${name}</span></label>`,
  )}</div>
<p class="drop"><input type="file" id="file" accept="image/png,image/jpeg,image/webp,image/gif,image/bmp" @change=${act.addChosenFile}><label for="file" class="button">Choose a picture</label> <span>or drop one on the page.</span></p>
<p id="picture-message" role="alert">${pictureMessage}</p>
</fieldset>
<div class="question">
<label for="question">Question</label>
<div class="row"><input id="question" type="text" maxlength="4000" autocomplete="off" enterkeyhint="send" .value=${chosen.question} @input=${(event) => act.typeQuestion(event.target.value)}><button type="submit" id="ask" class="main" ?disabled=${isAsking || server.name !== "ready"}>${isAsking ? "Asking" : "Ask"}</button></div>
<div id="suggestions" role="group" aria-label="Questions about this scene" ?hidden=${questions.length === 0}>${questions.map(
    ([text]) => html`<button type="button" aria-pressed=${text === chosen.question} @click=${() => act.chooseQuestion(text)}>${text}</button>`,
  )}</div>
</div>
</form>`;
}

// In tokens once it is known how many there are, as a share before.
function budgetView({ chosen, numTokens, panes, isPlaying }, act, hasPatches) {
  const total = numTokens ?? 100;
  const kept = numKept(chosen.budget, total);
  const share = Math.round((100 * kept) / total);
  const text = numTokens === null ? `${share}% of the image tokens` : `${kept} of ${total} image tokens, ${share}%`;
  const covered = coveredOf(panes[0], chosen.budget);
  return html`<div class="budget">
<label for="budget">Budget</label><output id="budget-text" for="budget">${text}</output>
<div class="row"><input type="range" id="budget" min="1" max=${total} .value=${String(kept)} aria-valuetext=${text + covered} @input=${(event) => act.moveBudget(event.target.value)}><button type="button" id="play" ?hidden=${!hasPatches} @click=${act.play}>${isPlaying ? "Stop" : "Play"}</button></div>
</div>`;
}

function optionsView(names, chosen) {
  return names.map((name) => html`<option value=${name} .selected=${name === chosen}>${name || "nothing"}</option>`);
}

function coveredOf(pane, budget) {
  const coverage = pane?.found ? keptOf(pane.found, budget).coverage : null;
  return coverage === null ? "" : `, ${percent(coverage)} covered`;
}

function paneView(pane, method, content, { chosen, pictures }) {
  const { found, message } = pane;
  const kept = found && keptOf(found, chosen.budget);
  const name = pictures.get(pane.picture)?.name ?? "Picture";
  const label = found
    ? `${name}: ${kept.count} of ${found.tokens} patches kept by ${pane.method}.${placesOf(found, kept.patches)}`
    : `${name}, as the model sees it. No patches are shown.`;
  const draws = pane.method === "random" ? "A server draws others, for each image, question and budget." : "";
  return html`<article class="pane" aria-busy=${pane.isBusy ? "true" : nothing}>
<h2>${method}</h2>
<figure><canvas role="img" aria-label=${label} data-kept=${found ? kept.count : nothing}></canvas><figcaption>${
    found ? html`<span><strong>${`${kept.count} of ${found.tokens}`}</strong> <span>${`image tokens kept${coveredOf(pane, chosen.budget)}`}</span></span>` : nothing
  }</figcaption></figure>
${curveView(found, chosen.budget)}
<p class=${message ? "note warning" : "note"} role="status">${message || content.no_patches || draws}</p>
</article>`;
}

function placesOf({ smaller, grid: [, columns] }, patches) {
  if (smaller) return ` The whole picture, made smaller to ${smaller[1]} by ${smaller[0]} tokens.`;
  const places = patches.slice(0, 5).map((token) => `row ${Math.floor(token / columns) + 1} column ${(token % columns) + 1}`);
  return places.length ? ` First picked: ${places.join(", ")}.` : "";
}

// Of a method that was asked for one budget, only the coverage at that one is known.
function curveView(found, budget) {
  if (!found || found.budget !== undefined) return nothing;
  const { coverage, tokens } = found;
  const points = coverage.map((share, idx) => `${((100 * (idx + 1)) / tokens).toFixed(2)} ${(20 - 20 * share).toFixed(2)}`);
  const place = ((100 * numKept(budget, tokens)) / tokens).toFixed(2);
  return html`<p class="axis" aria-hidden="true">Coverage by tokens kept</p>
<svg class="curve" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true"><path d=${`M0 20L${points.join("L")}`}></path><line x1=${place} x2=${place} y1="0" y2="20"></line></svg>`;
}

function answersView({ asked, cards, answersStatus }) {
  return html`<section id="answers" aria-labelledby="answers-title">
<h2 id="answers-title">Answers</h2>
<p id="asked">${asked}</p>
<div id="cards">${cards.map(
    (card) => html`<article class="card" aria-busy=${card.isBusy ? "true" : nothing}>
<h3>${card.title}</h3>
<p class=${card.isError ? "answer error" : "answer"}>${card.text}</p>
<dl>${card.facts.map(([name, value], idx) => html`<dt>${name}</dt><dd class=${idx === 0 ? "lead" : ""}>${value}</dd>`)}</dl>
<p class=${card.isWarning ? "note warning" : "note"}>${card.note}</p>
</article>`,
  )}</div>
<p id="answers-status" role="status" class="visually-hidden">${answersStatus}</p>
</section>`;
}
