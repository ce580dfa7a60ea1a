/** `lc bench attention --errors DIR`: inputs, random and adversarial, and what attention makes of them, for a judge in f64: peers/attention.py --errors DIR. */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { attentionBackward, attentionForward } from '@lc/attention';
import { copy, type DeviceLike, type DType, empty, fromTypedArray, Scope, type Tensor, Workspace, zeros } from '@lc/tensor';
import { writeSafetensors } from '@lc/tensor/safetensors';
import { count, newReport, type Report, type Row, text } from './report.js';

interface Shape {
  n: number;
  heads: number;
  kvHeads: number;
  d: number;
}

interface Case {
  /** Deviation of the queries; keys, values and dout have 1. */
  spread?: number;
  /** A third of the way in lies a key along which every query has a share: its score is 12 |u|^2 / sqrt(d), u a vector of signs. */
  dominant?: boolean;
  /** Every token is a document of its own and sees its own key alone. */
  alone?: boolean;
  sinks?: boolean;
}
const cases: Record<string, Case> = {
  random: {},
  'random, sinks': { sinks: true },
  'large logits': { spread: 25 },
  'few keys carry a row': { spread: 6 },
  'few keys carry a row, sinks': { spread: 6, sinks: true },
  'equal logits': { spread: 0 },
  'one dominant key': { dominant: true },
  'one key': { alone: true },
};

/** Normal numbers, the same for a seed: mulberry32 and Box-Muller. */
function normal(n: number, seed: number): Float32Array {
  let state = seed >>> 0;
  const next = (): number => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return Float32Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()));
}

const sign = (x: number): number => (Math.imul(x + 1, 0x9e3779b1) & 0x8000 ? 1 : -1);

async function run(path: string, label: string, device: DeviceLike, shape: Shape, c: Case): Promise<void> {
  const { n, heads, kvHeads, d } = shape;
  using scope = new Scope();
  using ws = new Workspace({ device });
  const dtype = ws.dtype;
  const put = (values: Float32Array | Int32Array, size: number[], to: DType): Tensor => {
    using host = fromTypedArray(values, size);
    using low = empty(size, { dtype: to });
    copy(low, host);
    const out = scope.own(empty(size, { dtype: to, device, label: 'bench' }));
    copy(out, low);
    return out;
  };
  const [rows, kv] = [
    [n, heads, d],
    [n, kvHeads, d],
  ];
  const queries = normal(n * heads * d, 1).map((x) => x * (c.spread ?? 1));
  const keys = normal(n * kvHeads * d, 2);
  if (c.dominant) {
    for (let i = 0; i < queries.length; i++) queries[i] = (queries[i] as number) + sign(i % d);
    const at = Math.floor(n / 3) * kvHeads * d;
    for (let i = 0; i < kvHeads * d; i++) keys[at + i] = 12 * sign(i % d);
  }
  const [q, k, v, dout] = [
    put(queries, rows, dtype),
    put(keys, kv, dtype),
    put(normal(n * kvHeads * d, 3), kv, dtype),
    put(normal(n * heads * d, 4), rows, dtype),
  ];
  const sinks = c.sinks
    ? put(
        normal(heads, 5).map((x) => 2 * x),
        [heads],
        'f32',
      )
    : null;
  const docStart = c.alone
    ? put(
        Int32Array.from({ length: n }, (_, i) => i),
        [n],
        'i32',
      )
    : null;
  const make = (size: number[], to: DType): Tensor => scope.own(zeros(size, { dtype: to, device, label: 'bench' }));
  const [out, lse, dq, dk, dv] = [make(rows, dtype), make([n, heads], 'f32'), make(rows, dtype), make(kv, 'f32'), make(kv, 'f32')];
  const dSinks = c.sinks ? make([heads], 'f32') : null;
  const args = { q, k, v, out, lse, start: 0, sinks, docStart, ws };
  attentionForward(args);
  attentionBackward({ ...args, dout, dq, dk, dv, dSinks });
  const all = { q, k, v, dout, out, lse, dq, dk, dv, ...(sinks && dSinks ? { sinks, dSinks } : {}) };
  await writeSafetensors(
    path,
    Object.entries(all).map(([name, data]) => ({ name, data })),
    { case: label, alone: String(c.alone === true) },
  );
}

/** @throws ERR_LC_IO where `dir` cannot be written */
export async function benchAttentionErrors(device: DeviceLike, dir: string): Promise<Report> {
  const report = newReport('attention-errors', device);
  mkdirSync(dir, { recursive: true });
  const rows: Row[] = [];
  for (const d of [64, 128])
    for (const [name, c] of Object.entries(cases)) {
      const shape = { n: device === 'cpu' ? 64 : 2048, heads: 16, kvHeads: 2, d };
      const label = `${name}, ${shape.heads}/${shape.kvHeads} x ${d}, ${count(shape.n)}`;
      const file = `${String(rows.length).padStart(2, '0')}-${name.replace(/\W+/g, '-')}-${d}.safetensors`;
      await run(join(dir, file), label, device, shape, c);
      rows.push({ name, heads: `${shape.heads}/${shape.kvHeads} x ${d}`, tokens: shape.n, file });
    }
  report.tables.push({
    title: 'Attention, inputs and results',
    columns: [
      ['case', text('name')],
      ['heads', text('heads')],
      ['tokens', text('tokens')],
      ['file', text('file')],
    ],
    rows,
  });
  report.notes.push(`python3 peers/attention.py --errors ${dir} holds them, and PyTorch's attention on the same inputs, against f64.`);
  return report;
}
