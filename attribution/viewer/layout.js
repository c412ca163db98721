// Places the nodes: columns are tokens (an image is one column), rows are layers, inputs at the bottom.

const PITCH = 16;
const AXIS_WIDTH = 62;
const LABEL_HEIGHT = 74;
const TARGET_HEIGHT = 62;
const TARGET_PITCH = 62;

function layOut(model, visible, width, height) {
  const { columns, ofPosition } = makeColumns(model, visible);
  const rows = makeRows(model);
  widenColumns(columns, rows, width - AXIS_WIDTH - 8);
  placeRows(columns, rows, height);
  const positions = new Map();
  for (const column of columns) placeColumn(model, column, rows, positions);
  const right = columns.length ? columns[columns.length - 1].x + columns[columns.length - 1].width : AXIS_WIDTH;
  placeTargets(model, ofPosition, rows, right, positions);
  return { columns, rows, positions, width: right + 8, height: rows[0].bottom + LABEL_HEIGHT };
}

function makeColumns(model, visible) {
  const { positions, images } = model.metadata;
  const columns = [];
  const ofPosition = [];
  const ofImage = new Map();
  for (const [position, at] of positions.entries()) {
    let column = at.image === null ? undefined : ofImage.get(at.image);
    if (!column) {
      column = { kind: at.image === null ? "text" : "image", position, image: at.image, cells: new Map(), width: 24 };
      columns.push(column);
      if (at.image !== null) {
        const { grid_rows: gridRows, grid_cols: gridCols } = images[at.image];
        column.patch = Math.max(3, Math.min(12, Math.floor(112 / Math.max(gridRows, gridCols))));
        column.width = column.patch * gridCols + 16;
        column.gridHeight = column.patch * gridRows + 14;
        ofImage.set(at.image, column);
      }
    }
    ofPosition.push(column);
  }
  const biases = { kind: "bias", cells: new Map(), width: 24 };
  for (const node of visible) {
    const column = node.kind === "bias" ? biases : ofPosition[node.ctx_idx];
    if (!column.cells.has(node.row)) column.cells.set(node.row, []);
    column.cells.get(node.row).push(node);
  }
  for (const column of columns) {
    for (const cell of column.cells.values()) {
      cell.sort((a, b) => (column.kind === "image" ? a.ctx_idx - b.ctx_idx : b.path_share - a.path_share));
    }
  }
  return { columns: biases.cells.size ? [biases, ...columns] : columns, ofPosition };
}

function makeRows(model) {
  return Array.from({ length: model.metadata.n_layers + 2 }, (_, index) => ({ index, lines: 1 }));
}

function slots(column) {
  return Math.max(1, Math.floor((column.width - 6) / PITCH));
}

// Gives the free width, one node pitch at a time, to the cell with the most lines; the rest is shared equally.
function widenColumns(columns, rows, available) {
  let free = available - columns.reduce((sum, column) => sum + column.width, 0);
  for (;;) {
    let fullest = null;
    let most = 1;
    for (const column of columns) {
      for (const cell of column.cells.values()) {
        const lines = Math.ceil(cell.length / slots(column));
        if (lines > most) { most = lines; fullest = column; }
      }
    }
    if (!fullest || free < PITCH) break;
    fullest.width += PITCH;
    free -= PITCH;
  }
  const padding = Math.max(0, free / Math.max(1, columns.length));
  let x = AXIS_WIDTH;
  for (const column of columns) {
    column.width += Math.min(padding, 60);
    column.x = x;
    x += column.width;
    for (const [row, cell] of column.cells) {
      rows[row].lines = Math.max(rows[row].lines, Math.ceil(cell.length / slots(column)));
    }
  }
}

function placeRows(columns, rows, height) {
  const tallest = Math.max(36, ...columns.map((column) => column.gridHeight ?? 0));
  for (const row of rows) row.height = row.lines * PITCH + 12;
  rows[rows.length - 1].height = TARGET_HEIGHT;
  rows[0].height = Math.max(rows[0].height, tallest);
  const spare = height - LABEL_HEIGHT - rows.reduce((sum, row) => sum + row.height, 0);
  const inner = rows.slice(1, -1);
  if (spare > 0) for (const row of inner) row.height += spare / inner.length;
  let y = 0;
  for (const row of [...rows].reverse()) {
    row.top = y;
    y += row.height;
    row.bottom = y;
    row.middle = (row.top + row.bottom) / 2;
  }
}

function placeColumn(model, column, rows, positions) {
  const centre = column.x + column.width / 2;
  for (const [row, cell] of column.cells) {
    const perLine = slots(column);
    const lines = Math.ceil(cell.length / perLine);
    cell.forEach((node, number) => {
      const line = Math.floor(number / perLine);
      const inLine = Math.min(perLine, cell.length - line * perLine);
      const x = centre + ((number % perLine) - (inLine - 1) / 2) * PITCH;
      positions.set(node, { x, y: rows[row].middle + (line - (lines - 1) / 2) * PITCH });
    });
  }
  const bottom = rows[0];
  if (column.kind === "text") {
    const token = model.tokenAt.get(column.position);
    if (token) positions.set(token, { x: centre, y: bottom.middle });
  }
  if (column.kind === "image") placePatches(model, column, centre, bottom, positions);
}

function placePatches(model, column, centre, bottom, positions) {
  const { grid_rows: gridRows, grid_cols: gridCols } = model.metadata.images[column.image];
  column.gridX = centre - (gridCols * column.patch) / 2;
  column.gridY = bottom.bottom - 6 - gridRows * column.patch;
  for (const node of model.patches[column.image].values()) {
    positions.set(node, {
      x: column.gridX + (node.patch_col + 0.5) * column.patch,
      y: column.gridY + (node.patch_row + 0.5) * column.patch,
      size: column.patch,
    });
  }
}

// Targets are above their token; several are spread so that their labels do not overlap.
function placeTargets(model, ofPosition, rows, right, positions) {
  const top = rows[rows.length - 1];
  const targets = model.nodes.filter((node) => node.kind === "logit");
  const wanted = targets.map((node) => ({ node, x: ofPosition[node.ctx_idx].x + ofPosition[node.ctx_idx].width / 2 }));
  wanted.sort((a, b) => a.x - b.x);
  const pitch = Math.min(TARGET_PITCH, (right - AXIS_WIDTH) / Math.max(1, wanted.length));
  let previous = -Infinity;
  for (const item of wanted) previous = item.x = Math.max(item.x, previous + pitch);
  let limit = right - pitch / 2;
  for (const item of wanted.reverse()) {
    item.x = Math.min(item.x, limit);
    limit = item.x - pitch;
    positions.set(item.node, { x: item.x, y: top.bottom - 16 });
  }
}
