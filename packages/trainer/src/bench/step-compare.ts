/** Paired runs: what an optimization costs in time, and whether another chunk size gives the same gradients. */
import { type CausalLM, fillRandom } from '@lc/models';
import { copy, empty } from '@lc/tensor';
import { median } from './clock.js';
import { chooseKernels } from './kernels.js';
import { applyCaps } from './memory-caps.js';
import type { Optimization, StepCase } from './step-case.js';
import { isShort, PreparedStep, type StepIo } from './step-run.js';

export interface CompareResult {
  tokens: number;
  what: Optimization;
  fits: boolean;
  reason?: string;
  chunk?: number;
  tile?: number;
  lossChunk?: number;
  /** Seconds of each pair's runs, with the optimization and without it. */
  withSeconds?: number[];
  withoutSeconds?: number[];
  /** Median over the pairs of with / without - 1. */
  overhead?: number;
  /** Least and most of the pairs. */
  spread?: [number, number];
  warnings?: string[];
}

/** Pairs where none are asked for: about 25 s of them. */
const pairsFor = (secondsOfPair: number): number => Math.max(3, Math.min(9, Math.round(25 / secondsOfPair)));

/**
 * Steps (forward, loss, backward) with an optimization and without it, all else equal, in memory that both hold at the same time: a pair of whole steps that is not
 * counted (the first step of a length loads kernels, lets libraries choose theirs, and touches memory), then `rounds` pairs; every other one begins with the step without, so that a card that slows down as it
 * warms favours neither. Checkpoints stay on the device but for 'offload', which sends all of them to the host. The sizes, the layers per checkpoint and what is kept (of it, whole chunks) are those
 * that the plan of the step with it chose.
 */
export async function compare(
  model: CausalLM,
  c: StepCase,
  what: Optimization,
  rounds: number | undefined,
  io: StepIo,
): Promise<CompareResult> {
  const base = { tokens: c.tokens, what };
  const neither = c.host ? c.without : [...new Set<Optimization>([...c.without, 'offload'])];
  const held: PreparedStep[] = [];
  applyCaps(model.device, c);
  try {
    const withIt = new PreparedStep(model, what === 'offload' ? { ...c, host: true } : { ...c, without: neither });
    held.push(withIt);
    const { chunk, tile, lossChunk, segment, keep } = withIt.reservation.plan;
    const sizes = { chunk, tile, lossChunk, layersPerSegment: segment, keep: { layers: keep.layers, tokens: keep.tokens } };
    const without = [...new Set<Optimization>([...(what === 'offload' ? c.without : neither), what])];
    held.push(new PreparedStep(model, { ...c, ...sizes, without }));
    const seconds: [number[], number[]] = [[], []];
    let warm = 0;
    for (const prepared of held) warm += await timed(prepared, c.tokens, io);
    const pairs = rounds ?? pairsFor(warm);
    for (let round = 0; round < pairs; round++) {
      for (const i of round % 2 === 0 ? ([0, 1] as const) : ([1, 0] as const)) {
        io.onProgress?.(`pair ${round + 1} of ${pairs}, ${i === 0 ? 'with' : 'without'} ${what}`);
        seconds[i].push(await timed(held[i] as PreparedStep, c.tokens, io));
      }
    }
    const [withSeconds, withoutSeconds] = seconds;
    const ratios = withSeconds.map((s, i) => s / (withoutSeconds[i] as number) - 1);
    const warnings = held.flatMap((prepared) => prepared.warnings);
    return {
      ...{ ...base, fits: true, chunk, tile, lossChunk, withSeconds, withoutSeconds },
      ...{ overhead: median(ratios), spread: [Math.min(...ratios), Math.max(...ratios)] },
      ...(warnings.length > 0 ? { warnings } : {}),
    };
  } catch (error) {
    if (!isShort(error)) throw error;
    return { ...base, fits: false, reason: error.message };
  } finally {
    for (const prepared of held.reverse()) {
      await prepared.sync();
      prepared.dispose();
    }
  }
}

async function timed(prepared: PreparedStep, tokens: number, io: StepIo): Promise<number> {
  io.optimizer.zeroGrad();
  await prepared.sync();
  const from = performance.now();
  await prepared.step(tokens, undefined, io.signal);
  await prepared.sync();
  return (performance.now() - from) / 1000;
}

export interface ChunkCheck {
  tokens: number;
  chunks: [number, number];
  losses: [number, number];
  /** |a - b| / |a| over each parameter's gradient. */
  medianError: number;
  worstError: number;
  worstName: string;
  parameters: number;
  /** What rounding alone makes of it, on a Hopper GPU: the first run again with the portable attention (other tiles, and so another rounding of P) and GEMM. */
  noise?: { loss: number; medianError: number; worstError: number };
}

interface Gradients {
  chunk: number;
  loss: number;
  gradients: Map<string, Float32Array>;
}

/**
 * Loss and gradients at two chunk sizes, from the same parameters; on a GPU beside those of the first chunk size on the portable kernels, which round otherwise, so that the reader sees what
 * bf16's noise is for this model and length (on a GPU that has no other attention kernels it tells less). @throws ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY
 */
export async function checkChunk(model: CausalLM, c: StepCase, other: number, io: StepIo): Promise<ChunkCheck> {
  const run = async (chunk: number | undefined): Promise<Gradients> => {
    applyCaps(model.device, c);
    const prepared = new PreparedStep(model, { ...c, chunk });
    try {
      io.optimizer.zeroGrad();
      const { loss } = await prepared.step(
        c.tokens,
        (text) => io.onProgress?.(`chunks of ${prepared.reservation.plan.chunk}: ${text}`),
        io.signal,
      );
      await prepared.sync();
      return { chunk: prepared.reservation.plan.chunk, loss, gradients: gradientsOf(model) };
    } finally {
      await prepared.sync();
      prepared.dispose();
    }
  };
  const first = await run(c.chunk);
  const second = await run(other);
  const result = {
    tokens: c.tokens,
    chunks: [first.chunk, second.chunk] as [number, number],
    losses: [first.loss, second.loss] as [number, number],
    ...errorsBetween(second, first),
    parameters: first.gradients.size,
  };
  if (!model.device.startsWith('cuda')) return result;
  using _ = chooseKernels({ LCTX_ATTENTION: 'portable', LCTX_GEMM: 'portable' });
  const again = await run(first.chunk);
  const { medianError, worstError } = errorsBetween(again, first);
  return { ...result, noise: { loss: again.loss, medianError, worstError } };
}

function errorsBetween(got: Gradients, want: Gradients): { medianError: number; worstError: number; worstName: string } {
  const errors = [...want.gradients].map(([name, a]) => ({ name, error: relativeError(got.gradients.get(name) as Float32Array, a) }));
  const worst = errors.reduce((most, e) => (e.error > most.error || Number.isNaN(e.error) ? e : most));
  return { medianError: median(errors.map((e) => e.error)), worstError: worst.error, worstName: worst.name };
}

function gradientsOf(model: CausalLM): Map<string, Float32Array> {
  return new Map(
    model.parameters.map(({ name, grad }) => {
      using host = empty(grad.shape, { label: 'bench' });
      copy(host, grad);
      return [name, (host.data() as Float32Array).slice()];
    }),
  );
}

/** Frobenius. */
function relativeError(got: Float32Array, want: Float32Array): number {
  let [difference, norm] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    difference += ((got[i] as number) - (want[i] as number)) ** 2;
    norm += (want[i] as number) ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** PEFT starts B at 0, and then no gradient reaches A: benches give it small random values. */
export function randomizeLoraB(model: CausalLM): void {
  for (const [i, { name, value }] of model.parameters.entries()) if (/lora_B/.test(name)) fillRandom(value, { seed: 1000 + i, std: 0.01 });
}
