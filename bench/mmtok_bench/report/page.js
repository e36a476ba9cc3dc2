// A plot takes its width when it is drawn, which paper, a scroll bar and another chapter beside it change later.
const resize = () => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
for (const moment of ["load", "beforeprint", "afterprint"]) addEventListener(moment, resize);

// Without the library of `mmtok demo --page`: lit-html would need each table's values a second time to draw its rows from,
// where moving the rows that are there takes a function.
//
// Tables sort by the column whose heading is pressed: numbers from the largest, words from the first; pressed again, the
// other way round. Rows stay below the heading of their group.
const collator = new Intl.Collator("en", { numeric: true });

function sort(table, column, isRising) {
  const groups = [[]];
  for (const row of table.tBodies[0].rows) {
    if (row.querySelector("th")) groups.push([]);
    groups.at(-1).push(row);
  }
  const isNumber = table.tHead.rows[0].cells[column].classList.contains("number");
  const key = (row) => (isNumber ? parseFloat(row.cells[column].dataset.key) : row.cells[column].textContent);
  const compare = (row, other) => {
    const [one, two] = [key(row), key(other)];
    // What has nothing to say stays below.
    if (isNumber && (Number.isNaN(one) || Number.isNaN(two))) return Number.isNaN(one) - Number.isNaN(two);
    return (isRising ? 1 : -1) * (isNumber ? one - two : collator.compare(one, two));
  };
  for (const group of groups) {
    const headings = group.filter((row) => row.querySelector("th"));
    table.tBodies[0].append(...headings, ...group.filter((row) => !headings.includes(row)).sort(compare));
  }
}

for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: heading.textContent });
    button.addEventListener("click", () => {
      const isRising = heading.ariaSort ? heading.ariaSort === "descending" : !heading.classList.contains("number");
      for (const each of headings) each.ariaSort = null;
      heading.ariaSort = isRising ? "ascending" : "descending";
      sort(table, column, isRising);
    });
    heading.replaceChildren(button);
  });
}

// Two machines beside each other, the same benchmark in the same row; all below one another again with nothing chosen.
const machines = [...document.querySelectorAll(".machine")];
const beside = document.querySelector(".beside");
const choices = [...beside.querySelectorAll("select")];

function place() {
  const shown = choices.map((choice) => machines[choice.value]);
  const isBeside = shown[0] !== undefined && shown[1] !== undefined && shown[0] !== shown[1];
  document.querySelector("main").classList.toggle("two", isBeside);
  const titleOf = (part) => part.querySelector("h3").textContent;
  const titles = [...new Set(shown.flatMap((each) => [...(each?.querySelectorAll(".part") ?? [])].map(titleOf)))];
  for (const chapter of document.querySelectorAll(".chapter")) {
    chapter.hidden = isBeside && !shown.includes(chapter);
    chapter.style.gridColumn = isBeside ? shown.indexOf(chapter) + 1 : "";
    chapter.style.gridRow = isBeside ? `1 / span ${titles.length + 1}` : "";
    for (const part of chapter.querySelectorAll(".part")) {
      part.style.gridRow = isBeside ? titles.indexOf(titleOf(part)) + 2 : "";
    }
  }
  resize();
}

choices.forEach((choice, idx) => {
  choice.append(new Option(idx ? "nothing" : "all machines", ""));
  machines.forEach((machine, number) => choice.append(new Option(machine.querySelector("h2").textContent, number)));
  choice.addEventListener("change", place);
});
beside.hidden = machines.length < 2;
