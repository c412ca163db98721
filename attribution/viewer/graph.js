// Draws the graph: rows, columns, nodes and edges.

const NEGATIVE_DASH = "5 3";
const MOST_EDGES_OF_A_NODE = 300;

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  const { namespaceURI } = document.getElementById("drawing");
  return fill(document.createElementNS(namespaceURI, tag), attributes, children);
}

// Children are nodes or text; text never becomes markup.
function fill(target, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) target.setAttribute(name, value);
  }
  target.append(...children.filter((child) => child !== null));
  return target;
}

function drawGraph(model, layout) {
  const drawing = document.getElementById("drawing");
  drawing.setAttribute("width", layout.width);
  drawing.setAttribute("height", layout.height);
  const nodes = svg("g", { class: "nodes" });
  const groups = new Map();
  for (const node of inReadingOrder(layout)) {
    const group = drawNode(model, node, layout.positions.get(node));
    groups.set(node, group);
    nodes.append(group);
  }
  const [background, edges] = [svg("g", { class: "edges overall" }), svg("g", { class: "edges chosen" })];
  drawing.replaceChildren(drawFrame(model, layout), background, edges, nodes);
  return { layout, groups, background, edges };
}

function inReadingOrder(layout) {
  const at = layout.positions;
  return [...at.keys()].sort((a, b) => b.row - a.row || at.get(a).y - at.get(b).y || at.get(a).x - at.get(b).x);
}

function drawFrame(model, layout) {
  const frame = svg("g", { class: "frame", "aria-hidden": "true" });
  const { n_layers: layers, prompt_tokens: tokens } = model.metadata;
  for (const row of layout.rows) {
    const name = row.index === 0 ? "input" : row.index === layers + 1 ? "targets" : `layer ${row.index - 1}`;
    frame.append(svg("line", { x1: 0, x2: layout.width, y1: row.bottom, y2: row.bottom, class: "row-line" }));
    frame.append(svg("text", { x: 4, y: row.middle + 4, class: "row-name" }, name));
  }
  const bottom = layout.rows[0].bottom;
  for (const column of layout.columns) {
    const centre = column.x + column.width / 2;
    if (column.kind === "image") {
      frame.prepend(svg("rect", { x: column.x, y: 0, width: column.width, height: bottom, class: "image-column" }));
      drawPatchGrid(model, column, frame);
    } else if (column.kind === "bias") {
      frame.append(columnLabel(centre, bottom, "biases", "bias-name"));
    } else {
      frame.append(columnLabel(centre, bottom, tokenText(tokens[column.position]), "token-name"));
    }
  }
  return frame;
}

function columnLabel(x, y, text, className) {
  const shown = text.length > 11 ? `${text.slice(0, 10)}\u2026` : text;
  const transform = `translate(${x + 4} ${y + 12}) rotate(-48)`;
  return svg("text", { class: className, transform }, shown, titleOf(text));
}

function drawPatchGrid(model, column, frame) {
  const { grid_rows: rows, grid_cols: cols } = model.metadata.images[column.image];
  const [width, height] = [cols * column.patch, rows * column.patch];
  const outline = { x: column.gridX - 1, y: column.gridY - 1, width: width + 2, height: height + 2 };
  frame.append(svg("rect", { ...outline, class: "grid-frame" }));
  const label = svg("text", { x: column.x + column.width / 2, y: column.gridY + height + 22, class: "image-name" });
  label.append(svg("tspan", {}, imageName(model, column.image)));
  label.append(svg("tspan", { x: column.x + column.width / 2, dy: 14 }, `${rows} \u00d7 ${cols} patches`));
  frame.append(label);
}

function titleOf(text) {
  return svg("title", {}, text);
}

function drawNode(model, node, at) {
  const group = svg("g", {
    class: `node kind-${node.kind}`, "data-id": node.node_id, role: "button", tabindex: -1,
    transform: `translate(${at.x} ${at.y})`, "aria-pressed": "false",
    "aria-label": `${fullName(model, node)}, influence ${percent(node.path_share)}`,
  });
  const title = node.kind === "logit" ? "" : `\ninfluence ${percent(node.path_share)}`;
  group.append(titleOf(`${fullName(model, node)}${title}`), ...shapeOf(model, node, at));
  return group;
}

function shapeOf(model, node, at) {
  const strength = Math.sqrt(Math.min(1, node.path_share / model.top));
  const shade = { class: "shape", fill: shadeOf(strength) };
  const r = 4 + 3.5 * strength;
  switch (node.kind) {
    case "feature": return [svg("circle", { ...shade, r })];
    case "error": return [svg("path", { ...shade, d: `M0 ${-r - 1} L${r + 1} 0 L0 ${r + 1} L${-r - 1} 0 Z` })];
    case "bias": return [svg("path", { ...shade, d: `M0 ${-r - 1} L${r + 1} ${r} L${-r - 1} ${r} Z` })];
    case "image": return [svg("rect", { ...shade, ...squareOf(at.size - 1) })];
    case "text": return [svg("rect", { ...shade, ...squareOf(13) })];
    default: return [svg("circle", { class: "shape", r: 8 }), ...targetLabel(node)];
  }
}

function squareOf(side) {
  return { x: -side / 2, y: -side / 2, width: side, height: side };
}

function targetLabel(node) {
  const text = tokenText(node.clerp);
  const probability = node.token_prob === null ? "" : percent(node.token_prob);
  const shown = text.length > 9 ? `${text.slice(0, 8)}\u2026` : text;
  return [
    svg("text", { y: probability ? -26 : -13, class: "target-name" }, shown),
    svg("text", { y: -12, class: "target-probability" }, probability),
  ];
}

// White to purple: influence has no sign, so it uses neither of the two colours of signed edges.
function shadeOf(strength) {
  const [light, dark] = [[247, 244, 251], [74, 20, 134]];
  return `rgb(${light.map((from, i) => Math.round(from + (dark[i] - from) * strength)).join(" ")})`;
}

function drawEdges(group, layout, links, weightOf) {
  const drawn = links.filter((link) => layout.positions.has(link.from) && layout.positions.has(link.to));
  const largest = Math.max(1e-30, ...drawn.map(weightOf));
  group.replaceChildren(...drawn.map((link) => {
    const relative = weightOf(link) / largest;
    const [from, to] = [layout.positions.get(link.from), layout.positions.get(link.to)];
    const bend = (from.y - to.y) * 0.45;
    return svg("path", {
      class: link.weight < 0 ? "negative" : "positive",
      d: `M${from.x} ${from.y} C${from.x} ${from.y - bend} ${to.x} ${to.y + bend} ${to.x} ${to.y}`,
      "stroke-width": (0.6 + 3.4 * relative).toFixed(2),
      "stroke-opacity": (0.3 + 0.7 * Math.sqrt(relative)).toFixed(2),
      "stroke-dasharray": link.weight < 0 ? NEGATIVE_DASH : null,
    });
  }));
  return drawn.length;
}

// Draws the edges of one node over the background of strongest edges; linked nodes are outlined in the sign's colour.
function showNode(view, node, selected, pinned) {
  document.getElementById("drawing").classList.toggle("focused", Boolean(node));
  const inputs = node ? node.inputs.slice(0, MOST_EDGES_OF_A_NODE) : [];
  const outputs = node ? node.outputs.slice(0, MOST_EDGES_OF_A_NODE) : [];
  drawEdges(view.edges, view.layout, [...inputs, ...outputs].reverse(), (link) => link.share);
  const linked = new Map([...inputs.map((link) => [link.from, link]), ...outputs.map((link) => [link.to, link])]);
  const largest = Math.max(1e-30, ...[...linked.values()].map((link) => link.share));
  for (const [other, group] of view.groups) {
    const link = linked.get(other);
    group.classList.toggle("linked-positive", link !== undefined && link.weight >= 0);
    group.classList.toggle("linked-negative", link !== undefined && link.weight < 0);
    group.style.setProperty("--link", link ? (link.share / largest).toFixed(3) : 0);
    group.classList.toggle("shown", other === node);
    group.classList.toggle("selected", other === selected);
    group.classList.toggle("pinned", pinned.has(other));
    group.setAttribute("aria-pressed", other === selected);
  }
}

// The node that an arrow key moves to: the nearest one in its direction.
function neighbourOf(view, node, key) {
  const at = view.layout.positions;
  const here = at.get(node);
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  let best = null;
  let least = Infinity;
  for (const [other, there] of at) {
    const along = dx * (there.x - here.x) + dy * (there.y - here.y);
    const across = Math.abs(dx ? there.y - here.y : there.x - here.x);
    const distance = along + 2.5 * across;
    if (other !== node && along > 1 && distance < least) { least = distance; best = other; }
  }
  return best;
}
