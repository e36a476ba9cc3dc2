// A picture on its canvas, with the patches that are kept of it.

import { keptOf } from "./selection.js";

const NUM_NUMBERED = 20;
export const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new WeakMap();

// Draws a pane, unless its canvas shows it already.
export function drawPane(canvas, { image, found }, budget) {
  if (!image || !canvas.clientWidth) return;
  const kept = found && keptOf(found, budget);
  const shown = [image, found, kept?.count, canvas.clientWidth, devicePixelRatio, dark.matches];
  if (drawn.get(canvas)?.every((each, idx) => each === shown[idx])) return;
  drawn.set(canvas, shown);
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round((canvas.width * image.naturalHeight) / image.naturalWidth);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (found?.smaller) drawSmaller(context, image, found);
  else if (found) drawKept(context, image, found.grid, kept.patches, scale);
}

// The whole picture with as many pixels as the smaller image has.
function drawSmaller(context, image, { smaller: [rows, columns], token_px }) {
  const small = new OffscreenCanvas(columns * token_px, rows * token_px);
  small.getContext("2d").drawImage(image, 0, 0, small.width, small.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
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
  context.fillStyle = dark.matches ? "rgba(20,24,29,0.78)" : "rgba(251,251,250,0.8)";
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
  context.strokeStyle = dark.matches ? "#e7eaee" : "#1d232c";
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
