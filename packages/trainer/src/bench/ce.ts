/** `lc bench ce`: LM head and cross-entropy with the gradient of the hidden states, beside its two matrix products alone. */
import { chunkedCrossEntropy } from '@lc/chunked-ce';
import { presets } from '@lc/models';
import { type DeviceLike, empty, fromTypedArray, gemm, LcError, Scope, Workspace } from '@lc/tensor';
import { noise } from './bandwidth.js';
import { Clock } from './clock.js';
import { count, fixed, gibibytes, newReport, type Report, type Row } from './report.js';

export interface CeOptions {
  model: string;
  tokens: number;
}

export async function benchCe(device: DeviceLike, { model, tokens }: CeOptions): Promise<Report> {
  const onGpu = device !== 'cpu';
  const preset = presets[model];
  if (!preset) throw new LcError('ERR_LC_CONFIG', `--model: no preset '${model}'; there are ${Object.keys(presets).join(', ')}`);
  const [vocab, width] = [preset.vocab_size as number, preset.hidden_size as number];
  const report = newReport('ce', device);
  using scope = new Scope();
  using clock = new Clock(device);
  const hidden = noise(scope, device, [tokens, width]);
  const weight = noise(scope, device, [vocab, width], { seed: 2, std: 0.02 });
  const dHidden = noise(scope, device, [tokens, width], { seed: 3 });
  const ids = Int32Array.from({ length: tokens }, (_, i) => (i * 7919) % vocab);
  const labels = scope.own(fromTypedArray(ids, [tokens]));
  const sum = scope.own(empty([2], { device, label: 'bench' }));
  const flop = 4 * tokens * width * vocab;
  const rows: Row[] = [];
  for (const chunk of [512, 1024, 2048, 4096].filter((rows) => rows <= tokens)) {
    using own = new Scope();
    const ws = own.own(new Workspace({ device }));
    const ms = await clock.time(() => chunkedCrossEntropy({ hidden, weight, labels, dHidden, lossSum: sum, chunk, ws }), { rounds: 5 });
    // The same two products without a loss, into memory of their own.
    const logits = own.own(empty([chunk, vocab], { device, label: 'bench' }));
    const dLogits = noise(own, device, [chunk, vocab], { seed: 4 });
    const floor = await clock.time(
      () => {
        for (let at = 0; at < tokens; at += chunk) {
          const n = Math.min(chunk, tokens - at);
          gemm({ a: hidden.rows(at, n), b: weight, c: logits.rows(0, n), transB: true });
          gemm({ a: dLogits.rows(0, n), b: weight, c: dHidden.rows(at, n) });
        }
      },
      { rounds: 5 },
    );
    rows.push({ chunk, ms, tflops: flop / ms / 1e9, productsMs: floor, ratio: ms / floor, extraBytes: ws.peakBytes });
  }
  report.tables.push({
    title: `${count(tokens)} x ${count(width)} x ${count(vocab)}, loss and gradient of the hidden states`,
    columns: [
      ['rows of logits alive', (row) => count(row.chunk as number)],
      ['ms', fixed('ms', 2)],
      ['TFLOP/s', fixed('tflops', onGpu ? 0 : 3)],
      ['its two products alone, ms', fixed('productsMs', 2)],
      ['ratio', fixed('ratio', 2)],
      ['memory beyond inputs and outputs', (row) => gibibytes(row.extraBytes as number)],
    ],
    rows,
  });
  report.notes.push(`f32 logits of all rows and their gradient would take ${gibibytes(8 * tokens * vocab)}.`);
  return report;
}
