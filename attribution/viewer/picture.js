// The pictures with their patches, and the prompt's tokens, highlighted by their contribution to the node in focus.

const VEIL = 0.66;

function drawPictures(model) {
  const host = document.getElementById("pictures");
  host.replaceChildren(...model.metadata.images.map((image, number) => drawPicture(model, image, number)));
  host.hidden = model.metadata.images.length === 0;
}

function drawPicture(model, image, number) {
  const { width, height, grid_rows: rows, grid_cols: cols } = image;
  const picture = svg("svg", {
    class: rows * cols > 256 ? "picture fine" : "picture", viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Image ${number} with ${rows} by ${cols} patches. Arrow keys move, Enter selects.`,
  });
  const pixels = svg("image", { href: image.data_uri, width, height, preserveAspectRatio: "none" });
  if (Math.max(width, height) < 256) pixels.setAttribute("class", "pixelated");
  picture.append(pixels, ...drawUnseen(image));
  for (let row = 0; row < rows; row += 1) {
    for (let col = 0; col < cols; col += 1) picture.append(drawPatch(model, image, number, row, col));
  }
  const caption = `${width} \u00d7 ${height} pixels, ${rows} \u00d7 ${cols} patches (row, column from 0)`;
  return element("figure", {}, picture, element("figcaption", {}, caption));
}

// The part outside of the patch grid, which the image processor crops.
function drawUnseen(image) {
  const [left, top, right, bottom] = image.region;
  if (left <= 0 && top <= 0 && right >= image.width && bottom >= image.height) return [];
  const d = `M0 0 H${image.width} V${image.height} H0 Z M${left} ${top} V${bottom} H${right} V${top} Z`;
  const title = titleOf("cropped: not part of the model\u2019s input");
  return [svg("path", { d, class: "unseen", "fill-rule": "evenodd" }, title)];
}

function drawPatch(model, image, number, row, col) {
  const [left, top, right, bottom] = image.region;
  const [width, height] = [(right - left) / image.grid_cols, (bottom - top) / image.grid_rows];
  const box = { x: left + col * width, y: top + row * height, width, height };
  const node = model.patches[number].get(patchKey(row, col));
  const rim = Math.min(width, height) * 0.09;
  const inner = { x: box.x + rim / 2, y: box.y + rim / 2, width: width - rim, height: height - rim };
  return svg("g", {
    class: "patch", "data-id": node ? node.node_id : null, "data-row": row, "data-col": col, role: "button",
    tabindex: row === 0 && col === 0 ? 0 : -1, "aria-label": `patch row ${row}, column ${col}`,
  }, titleOf(""), svg("rect", { ...box, class: "veil" }), svg("rect", { ...inner, class: "rim", "stroke-width": rim }));
}

function drawPrompt(model) {
  const host = document.getElementById("prompt");
  const chips = [];
  const seen = new Set();
  for (const [position, at] of model.metadata.positions.entries()) {
    if (at.image === null) {
      const node = model.tokenAt.get(position);
      const text = tokenText(model.metadata.prompt_tokens[position]);
      chips.push(element("button", { type: "button", class: "token", "data-id": node.node_id }, text));
    } else if (!seen.has(at.image)) {
      seen.add(at.image);
      const { grid_rows: rows, grid_cols: cols } = model.metadata.images[at.image];
      const label = `${imageName(model, at.image)}: ${rows} \u00d7 ${cols} patches`;
      chips.push(element("span", { class: "image-chip" }, label));
    }
  }
  host.replaceChildren(...chips);
}

// Highlights patches and tokens by what they contribute to `node`: a signed edge, or a share without a sign. Patches
// and tokens have separate scales: a patch is one of many, and its share would be invisible beside that of a token.
function highlightInputs(model, node, mode) {
  const values = node && node.inputs.length ? valuesInto(model, node, mode) : new Map();
  const direct = mode === "direct";
  const own = node ? ownPatch(model, node) : null;
  const sizeOf = (origin) => Math.abs(values.get(origin) ?? 0);
  const largestOf = (kind) => Math.max(0, ...model.nodes.filter((one) => one.kind === kind).map(sizeOf));
  const largest = { image: largestOf("image"), text: largestOf("text") };
  const any = Math.max(largest.image, largest.text) > 0;
  const strengthOf = (origin) => (sizeOf(origin) > 0 ? sizeOf(origin) / largest[origin.kind] : 0);
  for (const group of document.querySelectorAll(".patch")) {
    const origin = model.byId.get(group.dataset.id);
    const value = values.get(origin) ?? 0;
    const [title, veil, rim] = group.children;
    veil.setAttribute("fill-opacity", largest.image > 0 ? (VEIL * (1 - strengthOf(origin))).toFixed(3) : 0);
    rim.setAttribute("class", `rim ${toneOf(value, direct)}`);
    rim.setAttribute("stroke-opacity", strengthOf(origin).toFixed(3));
    group.classList.toggle("own", origin !== undefined && origin === own);
    title.textContent = describe(`patch row ${group.dataset.row}, column ${group.dataset.col}`, value, any, direct);
  }
  for (const chip of document.querySelectorAll(".token")) {
    const origin = model.byId.get(chip.dataset.id);
    const value = values.get(origin) ?? 0;
    chip.className = `token ${toneOf(value, direct)}`;
    chip.style.setProperty("--strength", strengthOf(origin).toFixed(3));
    chip.classList.toggle("own", origin === own);
    chip.title = describe(`position ${origin.ctx_idx}`, value, any, direct);
  }
  document.getElementById("origin").textContent = explainHighlights(model, node, largest, direct);
}

function toneOf(value, direct) {
  if (!direct) return "unsigned";
  return value < 0 ? "negative" : "positive";
}

function describe(place, value, any, direct) {
  if (!any) return place;
  return direct ? `${place}: edge ${signed(value)}` : `${place}: ${percent(value)} of the input`;
}

// The token or patch at the node's own position.
function ownPatch(model, node) {
  if (node.kind === "bias") return null;
  const at = model.metadata.positions[node.ctx_idx];
  if (at.image === null) return model.tokenAt.get(node.ctx_idx);
  return model.patches[at.image].get(patchKey(at.patch_row, at.patch_col));
}

function explainHighlights(model, node, largest, direct) {
  if (!node) return "Select a node to see which patches and tokens contribute to it.";
  const name = shortName(model, node);
  if (node.inputs.length === 0) return `${name} has no inputs on this page; the graph shows its outputs.`;
  const textOf = (value) => (direct ? signed(value).slice(1) : percent(value));
  const found = [["patch", largest.image], ["token", largest.text]].filter(([, value]) => value > 0);
  if (found.length === 0 && direct) return `No patch or token has a direct edge into ${name} on this page.`;
  if (found.length === 0) return `No path on this page leads from a patch or token to ${name}.`;
  const brightest = found.map(([kind, value]) => `brightest ${kind} ${textOf(value)}`).join(", ");
  if (direct) return `Direct edges into ${name}: ${brightest} in absolute value.`;
  return `Share of the input of ${name}: ${brightest}.`;
}

function patchBeside(group, key) {
  const [row, col] = [Number(group.dataset.row), Number(group.dataset.col)];
  const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
  return group.parentNode.querySelector(`[data-row="${row + down}"][data-col="${col + right}"]`);
}
