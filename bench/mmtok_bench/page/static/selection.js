// What a budget keeps of a selection that the page's program computed.

// The number of tokens of a budget: "all", a share such as "25%", or a number.
export function numKept(budget, total) {
  if (budget === "all") return total;
  const number = parseFloat(budget);
  return budget.endsWith("%") ? Math.max(1, Math.floor((number * total) / 100)) : Math.min(number, total);
}

// The kept patches in the order of picking, how many tokens they are, and the share that they cover, null if unknown. A
// method that is not nested keeps what it was asked for, wherever the slider stands.
export function keptOf({ order, tokens, pickable, coverage, smaller, budget: asked }, budget) {
  if (smaller) return { patches: [], count: smaller[0] * smaller[1], coverage: null };
  const count = asked ?? numKept(budget, tokens);
  if (count < tokens) {
    const patches = order.slice(0, Math.min(count, pickable));
    return { patches, count: patches.length, coverage: coverage[patches.length - 1] };
  }
  const all = new Set([...order, ...Array(tokens).keys()]);
  return { patches: [...all], count: tokens, coverage: 1 };
}

export const percent = (share) => `${(100 * share).toFixed(1)}%`;
