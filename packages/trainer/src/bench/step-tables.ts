/** How results of steps are printed. */
import { count, fixed, gibibytes, type Row, type Table, text } from './report.js';
import type { ChunkCheck, CompareResult } from './step-compare.js';
import type { StepResult } from './step-run.js';
import type { SearchResult } from './step-search.js';

const tokens = (row: Row): string => `${count(row.tokens as number)}${row.probe ? ' (probe)' : ''}`;
const vram = (row: Row): string => {
  const v = row.vram as StepResult['vram'];
  if (!v) return row.reason ? `does not fit: ${row.reason as string}` : '';
  return v.driverPeakBytes === null
    ? gibibytes(v.allocatorPeakBytes)
    : `${gibibytes(v.driverPeakBytes)} (${gibibytes(v.allocatorPeakBytes)})`;
};
const host = (row: Row): string => (row.hostBytes ? gibibytes((row.hostBytes as { peak: number }).peak) : '');

/** Layers whose attention output is kept, and of how many tokens, where not of all. */
const kept = ({ kept: layers, keptTokens, tokens: all }: Row): string =>
  layers === undefined ? '' : layers === 0 || keptTokens === all ? String(layers) : `${layers} x ${count(keptTokens as number)}`;

export function stepTable(rows: readonly Row[], title?: string): Table {
  return {
    ...(title ? { title } : {}),
    columns: [
      ['tokens', tokens],
      ['optimizations', text('name')],
      [
        'chunk / tile / loss chunk',
        (r) => (r.chunk === undefined ? '' : `${count(r.chunk as number)} / ${count(r.tile as number)} / ${count(r.lossChunk as number)}`),
      ],
      ['layers kept', kept],
      ['step', fixed('seconds', 2, ' s')],
      ['tokens/s', (r) => (r.tokensPerSecond === undefined ? '' : count(Math.round(r.tokensPerSecond as number)))],
      ['TFLOP/s', (r) => (r.tflops === undefined ? '' : (r.tflops as number).toPrecision(3))],
      ['floor', fixed('floorSeconds', 2, ' s')],
      ['step / floor', fixed('overFloor', 2)],
      ['peak VRAM: driver (allocator)', vram],
      ['host memory', host],
      ['loss', fixed('loss', 4)],
    ],
    rows,
  };
}

/** The same rows, cut another way: device time by phase, and memory by label. */
export function phaseTable(rows: readonly Row[]): Table {
  const phase =
    (name: string) =>
    (row: Row): string => {
      const seconds = (row.phases as Record<string, number> | undefined)?.[name];
      return seconds === undefined ? '' : `${seconds.toFixed(2)} s`;
    };
  return {
    title: "Device time by phase ('open': dequantization, and zeroing dK and dV, before a layer's first chunk; 'fill': K and V again)",
    columns: [
      ['tokens', tokens],
      ...['input', 'open', 'forward', 'loss', 'recompute', 'fill', 'backward', 'clip and AdamW'].map(
        (name) => [name, phase(name)] as const,
      ),
      ['dequantization alone', (r) => (r.dequantization ? `${(r.dequantization as { seconds: number }).seconds.toFixed(3)} s` : '')],
      ['waiting for copies (not hidden)', fixed('copyWaitSeconds', 3, ' s')],
      ['reserving before', fixed('reserveSeconds', 2, ' s')],
      [
        'VRAM by label',
        (r) =>
          Object.entries((r.vram as StepResult['vram'])?.byLabel ?? {})
            .filter(([, bytes]) => bytes > 1 << 26)
            .sort(([, a], [, b]) => b - a)
            .map(([label, bytes]) => `${label} ${(bytes / 2 ** 30).toFixed(2)}`)
            .join(', '),
      ],
    ],
    rows,
  };
}

export function compareTable(rows: readonly Row[]): Table {
  const list =
    (key: string) =>
    (row: Row): string =>
      (row[key] as number[] | undefined)?.map((s) => s.toFixed(3)).join(', ') ?? '';
  return {
    title: 'Pairs of steps with and without, after one pair that is not counted; every other pair begins without',
    columns: [
      ['tokens', tokens],
      ['optimization', text('what')],
      ['chunk / tile / loss chunk', (r) => (r.chunk === undefined ? '' : `${r.chunk} / ${r.tile} / ${r.lossChunk}`)],
      ['with, s', list('withSeconds')],
      ['without, s', (r) => (r.fits ? list('withoutSeconds')(r) : `does not fit: ${r.reason as string}`)],
      ['overhead: median of the pairs (least, most)', (r) => (r.overhead === undefined ? '' : overheadOf(r as Row & CompareResult))],
    ],
    rows,
  };
}

/** Device time by op of one row. */
export function opTable(row: StepResult): Table {
  const ops = row.ops ?? [];
  const total = ops.reduce((sum, { ms }) => sum + ms, 0);
  return {
    title: `Device time by op at ${count(row.tokens)} tokens: ${(total / 1000).toFixed(3)} s in ${count(ops.reduce((sum, { calls }) => sum + calls, 0))} calls of another step`,
    columns: [
      ['op (products: m x n x k)', text('op')],
      ['calls', text('calls')],
      ['ms', fixed('ms', 2)],
      ['of all', (r) => percent((r.ms as number) / total)],
      ['ms a call', (r) => ((r.ms as number) / (r.calls as number)).toFixed(3)],
    ],
    rows: ops as unknown as Row[],
  };
}

const percent = (share: number | undefined): string => (share === undefined ? '' : `${(100 * share).toFixed(2)}%`);
const overheadOf = ({ overhead, spread }: CompareResult): string =>
  `${percent(overhead)} (${percent(spread?.[0])}, ${percent(spread?.[1])})`;

export function checkTable(rows: readonly Row[]): Table {
  return {
    title: 'Loss and LoRA gradients at two chunk sizes (relative Frobenius error of each gradient)',
    columns: [
      ['tokens', tokens],
      ['chunks', (r) => (r.chunks as number[]).map(count).join(' and ')],
      ['losses', (r) => (r.losses as number[]).map((x) => x.toFixed(6)).join(', ')],
      ['median', (r) => (r.medianError as number).toExponential(1)],
      ['worst', (r) => (r.worstError as number).toExponential(1)],
      ['of', text('worstName')],
      ['rounding alone (portable attention and GEMM): loss', (r) => noise(r)?.loss.toFixed(6) ?? ''],
      ['median', (r) => noise(r)?.medianError.toExponential(1) ?? ''],
      ['worst', (r) => noise(r)?.worstError.toExponential(1) ?? ''],
    ],
    rows,
  };
}
const noise = (row: Row): ChunkCheck['noise'] => row.noise as ChunkCheck['noise'];

const longestText = (found: SearchResult | undefined): string => {
  if (!found) return '';
  const { maxTokens, plannedTokens, refused } = found;
  return plannedTokens > maxTokens && refused.length === 0
    ? `${count(maxTokens)} or more (the plan says ${count(plannedTokens)})`
    : count(maxTokens);
};

export function table1(rows: readonly Row[], length: number): Table {
  const step = (row: Row): Row => (row.step ?? {}) as Row;
  const longest = (row: Row): SearchResult | undefined => row.longest as SearchResult | undefined;
  return {
    columns: [
      ['optimizations', text('label')],
      ['longest length (probe)', (r) => longestText(longest(r))],
      [
        'its peak VRAM + host memory',
        (r) => {
          const probe = longest(r)?.probe as unknown as Row | null | undefined;
          return probe ? `${vram(probe)} + ${host(probe)}` : '';
        },
      ],
      [`peak VRAM at ${count(length)}: driver (allocator)`, (r) => vram(step(r))],
      ['host memory', (r) => host(step(r))],
      ['step', (r) => fixed('seconds', 2, ' s')(step(r))],
      ['step / floor', (r) => fixed('overFloor', 2)(step(r))],
    ],
    rows,
  };
}
