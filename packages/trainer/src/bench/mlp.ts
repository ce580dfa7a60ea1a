/** `lc bench mlp`: a layer's MLP with its 4-bit weights, over tiles, beside the same without tiles. */
import { syntheticModel } from '@lc/models';
import { type DeviceLike, LcError, Scope, Workspace } from '@lc/tensor';
import { noise } from './bandwidth.js';
import { Clock } from './clock.js';
import { floorRates } from './flops.js';
import { count, fixed, gibibytes, newReport, type Report, type Row } from './report.js';

export interface MlpOptions {
  model: string;
  tokens: number;
}

export async function benchMlp(device: DeviceLike, { model: name, tokens }: MlpOptions): Promise<Report> {
  const onGpu = device !== 'cpu';
  const report = newReport('mlp', device);
  using scope = new Scope();
  using clock = new Clock(device);
  const model = scope.own(await syntheticModel(name, { device, loadIn4bit: true, layers: 1 }));
  const [layer] = model.layers;
  const { hiddenSize: h, moe, intermediateSize } = model.config;
  if (!layer) throw new LcError('ERR_LC_CONFIG', `--model ${name}: no layers`);
  const x = noise(scope, device, [tokens, h]);
  const dout = noise(scope, device, [tokens, h], { seed: 2 });
  const out = noise(scope, device, [tokens, h], { seed: 3 });
  const at = { start: 0, length: tokens, docStart: null };
  const flop = 2 * tokens * (moe ? h * moe.numExperts + moe.numExpertsPerTok * 3 * h * moe.intermediateSize : 3 * h * intermediateSize);
  const rows: Row[] = [];
  for (const tile of [512, 1024, 2048, 4096, 8192, tokens].filter((tile, i, all) => tile <= tokens && all.indexOf(tile) === i)) {
    using ws = new Workspace({ device });
    model.setTile(tile);
    layer.mlp.open('backward', ws);
    try {
      const opened = ws.usedBytes;
      const forward = await clock.time(() => layer.mlp.forward(x, out, at, ws), { rounds: 5 });
      const backward = await clock.time(() => layer.mlp.backward(x, dout, out, at, ws), { rounds: 5 });
      rows.push({ tile, untiled: tile === tokens, forwardMs: forward, backwardMs: backward, tileBytes: ws.peakBytes - opened });
    } finally {
      layer.mlp.close();
    }
  }
  const whole = rows.at(-1) as { forwardMs: number; backwardMs: number };
  for (const row of rows) {
    const [f, b] = [row.forwardMs as number, row.backwardMs as number];
    row.forwardTflops = flop / f / 1e9;
    row.overUntiled = (f + b) / (whole.forwardMs + whole.backwardMs);
    // Backward recomputes gate and up (2/3 of a forward) and takes the gradient of the inputs (one forward).
    row.floorMs = onGpu ? ((1 + 5 / 3) * flop) / floorRates.gemm / 1e-3 : null;
  }
  report.tables.push({
    title: `${name}, one layer's MLP, ${count(tokens)} tokens; weights dequantized before`,
    columns: [
      ['tile', (row) => (row.untiled ? `${count(row.tile as number)} (untiled)` : count(row.tile as number))],
      ['forward, ms', fixed('forwardMs', 2)],
      ['TFLOP/s', fixed('forwardTflops', onGpu ? 0 : 3)],
      ['backward, ms', fixed('backwardMs', 2)],
      ['both over untiled', fixed('overUntiled', 3)],
      ['both at 750 TFLOP/s, ms', fixed('floorMs', 2)],
      ['memory of a tile', (row) => gibibytes(row.tileBytes as number)],
    ],
    rows,
  });
  return report;
}
