// The cards of answers: what the server sent, and whether it kept what is drawn.

import { percent } from "./selection.js";

export function cardOf(title, drawn = null) {
  return { title, drawn, text: "", facts: [], note: "", isBusy: true, isError: false, isWarning: false };
}

// Gives the events of /api/answers, a line of JSON each, as they come.
export async function* eventsOf(response) {
  const lines = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await lines.read(); !part.done; part = await lines.read()) {
    const complete = (rest + part.value).split("\n");
    rest = complete.pop();
    yield* complete.map((line) => JSON.parse(line));
  }
}

// Enters an event into its card; returns what a screen reader is told of it.
export function takeEvent(card, event) {
  if (event.waiting) {
    card.note = "Another tab is asking: this one waits for its turn.";
    return card.note;
  }
  if ("piece" in event) {
    card.text += event.piece;
  } else if ("answer" in event) {
    takeAnswer(card, event.answer);
    return `${card.title}: ${card.text}.`;
  } else if ("account" in event) {
    card.isBusy = false;
    takeAccount(card, event.account?.images?.[0]);
  } else if ("error" in event) {
    Object.assign(card, { isBusy: false, isError: true, text: event.error });
    return event.error;
  }
  return null;
}

function takeAnswer(card, { text, ttft_ms, num_prompt_tokens, num_image_tokens, num_cached_tokens }) {
  Object.assign(card, { text: text.trim() || "(an empty answer)", note: "" });
  card.facts.push(["time to first token", `${ttft_ms < 100 ? ttft_ms.toFixed(1) : Math.round(ttft_ms)} ms`]);
  card.facts.push(["prompt tokens", num_prompt_tokens]);
  if (num_image_tokens !== null) card.facts.push(["of the image", num_image_tokens]);
  if (num_cached_tokens) card.facts.push(["of them from a cache", num_cached_tokens]);
}

// What the server says that it kept, held against what is drawn; a server that computes in bfloat16 rounds otherwise.
function takeAccount(card, image) {
  if (!image) return;
  if (image.tokens_kept < image.tokens_in) card.facts.push(["image tokens in", image.tokens_in]);
  if (image.coverage !== null) card.facts.push(["covered, as the server says", percent(image.coverage)]);
  if (image.is_fallback) card.note = "The server could not select: it kept evenly spaced tokens.";
  if (!card.drawn || image.method !== "mmtok" || image.coverage === null) return;
  if (card.drawn.count !== image.tokens_kept || Math.abs(card.drawn.coverage - image.coverage) > 0.02) {
    card.note = "The server kept other tokens than are drawn here. Is the checkpoint here the one that it serves?";
    card.isWarning = true;
  }
}
