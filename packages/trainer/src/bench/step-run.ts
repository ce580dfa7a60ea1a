/** One training step of a model in memory: reserved, warmed up, timed. What does not fit is an answer, not a failure. */
import type { CausalLM, SequenceLoss, TokenSequence } from '@lc/models';
import type { AdamW } from '@lc/qlora';
import { deviceMemory, empty, fill, LcError, processMemory, resetPeak, Scope } from '@lc/tensor';
import { type Budgets, measureBudgets } from '../budgets.js';
import { planStep, type Reservation, type ReserveOptions, reserveStep } from '../reserve.js';
import { Clock } from './clock.js';
import { stepFlops } from './flops.js';
import { applyCaps } from './memory-caps.js';
import { type OpTime, profileOps } from './op-profile.js';
import { gibibytes } from './report.js';
import { nameOf, type StepCase, sizesOf } from './step-case.js';

export interface StepResult {
  tokens: number;
  name: string;
  without: readonly string[];
  /** Only two layers were executed. */
  probe: boolean;
  fits: boolean;
  /** Why not: the budget, and the longest length that fits. */
  reason?: string;
  layers?: number;
  chunk?: number;
  tile?: number;
  lossChunk?: number;
  layersPerSegment?: number;
  /** Layers whose attention output was kept for backward, and of how many tokens of each. */
  kept?: number;
  keptTokens?: number;
  reserveSeconds?: number;
  seconds?: number;
  tokensPerSecond?: number;
  loss?: number;
  gradNorm?: number;
  /** Seconds of device time; 'open' is what a layer does before its first chunk: dequantization, and zeroing dK and dV. */
  phases?: Record<string, number>;
  /** Seconds of it that the compute stream stood still for copies: what computation did not hide. */
  copyWaitSeconds?: number;
  /** Weights to the compute dtype: of one layer, measured apart, and that times the passes of the step. */
  dequantization?: { layerMs: number; passes: number; seconds: number };
  floorSeconds?: number;
  /** seconds / floorSeconds. */
  overFloor?: number;
  /** The floor's FLOPs over the seconds. */
  tflops?: number;
  /** `driverPeakBytes`: everything that this process takes, as the driver counts it; null on the CPU. */
  vram?: { driverPeakBytes: number | null; driverSource: string; allocatorPeakBytes: number; byLabel: Record<string, number> };
  /** Of the activation store, and all that lc's allocator holds of host memory for copies. */
  hostBytes?: { checkpoints: number; peak: number };
  checkpoints?: { deviceBytes: number; hostBytes: number };
  /** Of another step: device time by op, the longest first. */
  ops?: OpTime[];
  /** Plans that did not find the memory they counted on. */
  attempts?: number;
  warnings?: string[];
}

export interface StepIo {
  optimizer: AdamW;
  /** Told what goes on, at most once per chunk. */
  onProgress?: (text: string) => void;
  /** Told when a layer's forward or backward, or the loss, that took a second or more has ended. */
  onEnd?: (text: string) => void;
  signal?: AbortSignal;
}

const PROBE_LAYERS = 2;

/** Ids that a model of this vocabulary knows, all of them learnt. */
export function sequenceOf(model: CausalLM, tokens: number): TokenSequence {
  const inputIds = Int32Array.from({ length: tokens }, (_, i) => (i * 7919) % model.config.vocabSize);
  return { inputIds, labels: inputIds };
}

/** Whether an error says that memory is short. */
export const isShort = (error: unknown): error is LcError =>
  error instanceof LcError && (error.code === 'ERR_LC_PLAN' || error.code === 'ERR_LC_OUT_OF_MEMORY');

/** What a plan may count on when so many bytes are still to be taken beside it. On the CPU, where nothing caps the allocator, the case's caps are held here. */
function budgetsFor(model: CausalLM, c: StepCase, beside: number, stillToTake: boolean): Budgets {
  const free = measureBudgets(model.device);
  const vram = free.vram - (stillToTake ? beside : 0);
  const cap = (bytes: number | undefined): number =>
    model.device === 'cpu' ? (bytes ?? Number.POSITIVE_INFINITY) : Number.POSITIVE_INFINITY;
  const left = Math.min(vram, cap(c.vram) - beside);
  if (left <= 0) {
    throw new LcError(
      'ERR_LC_PLAN',
      `${c.tokens} tokens do not fit: ${model.device === 'cpu' ? 'RAM' : 'VRAM'}: ${gibibytes(beside)} of f32 logits and their gradient needed beside the rest, ` +
        `${gibibytes(left + beside)} to be had`,
    );
  }
  return { vram: left, ram: Math.min(free.ram, cap(c.ram)) };
}

function reserveOptions(model: CausalLM, c: StepCase, stillToTake: boolean): ReserveOptions {
  const { wholeLogitsBytes, ...sizes } = sizesOf(model, c);
  return {
    ...{
      model,
      tokens: c.tokens,
      layersPerSegment: c.layersPerSegment,
      keep: c.keep,
      deterministic: !c.nondeterministic,
      profile: c.profile,
    },
    ...sizes,
    budgets: budgetsFor(model, c, wholeLogitsBytes, stillToTake),
  };
}

/** Whether a plan can be made: nothing is taken. The caps of `c` must be in force (`applyCaps`). */
export function fits(model: CausalLM, c: StepCase): boolean {
  try {
    return planStep(reserveOptions(model, c, true)).fits;
  } catch (error) {
    if (!isShort(error)) throw error;
    return false;
  }
}

/** A case's memory, held until disposed. The caps of `c` must be in force (`applyCaps`). */
export class PreparedStep implements Disposable {
  readonly reservation: Reservation;
  readonly warnings: string[] = [];
  readonly reserveSeconds: number;
  private readonly scope = new Scope();

  /** @throws ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY */
  constructor(
    readonly model: CausalLM,
    readonly c: StepCase,
  ) {
    const from = performance.now();
    try {
      this.takeWholeLogits();
      this.reservation = this.scope.own(
        reserveStep({ ...reserveOptions(model, c, false), onWarning: (message) => this.warnings.push(message) }),
      );
    } catch (error) {
      this.scope.dispose();
      throw error;
    }
    this.reserveSeconds = (performance.now() - from) / 1000;
  }

  /** Filled, so that the memory is really there. Our kernel writes the gradient over the logits; plain PyTorch's second array is only held. */
  private takeWholeLogits(): void {
    const { model, c } = this;
    const { wholeLogitsBytes: bytes } = sizesOf(model, c);
    if (bytes === 0) return;
    const plan = planStep(reserveOptions(model, c, true));
    if (!plan.fits) {
      const what = `${c.tokens} tokens do not fit beside ${gibibytes(bytes)} of f32 logits and their gradient`;
      throw new LcError('ERR_LC_PLAN', `${what}: ${plan.reasons.join('; ')}`);
    }
    fill(this.scope.own(empty([bytes], { dtype: 'u8', device: model.device, label: 'whole logits' })), 0);
  }

  /** One pass through forward, loss and backward: gradients are added up. */
  async step(tokens: number, onProgress?: (text: string) => void, signal?: AbortSignal, onEnd?: SweepEnd): Promise<SequenceLoss> {
    const { model, c, reservation } = this;
    const sweeps = new Sweeps(onEnd);
    model.setTile(reservation.plan.tile); // another case may have changed it
    return reservation.session.step(sequenceOf(model, tokens), {
      ...(c.probe ? { layers: Math.min(PROBE_LAYERS, model.layers.length) } : {}),
      signal,
      onProgress: ({ phase, layer, done, total }) => {
        sweeps.at(phase, layer, done === total);
        const share = ((100 * done) / total).toFixed(0);
        onProgress?.(`${phase}${layer < 0 ? '' : `, layer ${layer}`}, ${share}% of the pass`);
      },
    });
  }

  /** Waits for the device. */
  async sync(): Promise<void> {
    await this.reservation.session.schedule.store.sync();
  }

  dispose(): void {
    this.scope.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

/** Told what ended, how long it took, and when: seconds of the step. */
type SweepEnd = (what: string, took: number, at: number) => void;

/**
 * Notices when the sweep of a layer over all chunks has ended: by the first report of the next one, so the time of the last report counts. At most two chunks are queued ahead of the
 * device; times are early by no more than those.
 */
export class Sweeps {
  private readonly start = performance.now();
  private began = this.start;
  private latest = this.start;
  private current = '';

  constructor(private readonly onEnd: SweepEnd | undefined) {}

  /** After each call on a chunk; `last`: of the pass. */
  at(phase: string, layer: number, last: boolean): void {
    const what = layer < 0 ? phase : `${phase}, layer ${layer}`;
    if (what !== this.current) this.end();
    this.current = what;
    this.latest = performance.now();
    if (last) this.end();
  }

  private end(): void {
    if (this.current !== '') this.onEnd?.(this.current, (this.latest - this.began) / 1000, (this.latest - this.start) / 1000);
    this.began = this.latest;
    this.current = '';
  }
}

/** Ends of sweeps shorter than this are not worth a line. */
const LONG_SWEEP = 1;

/** Most tokens of a warm-up. */
const WARM = 16384;

/** A warm-up of one chunk, which loads the kernels of these sizes and lets libraries choose theirs, then the timed step, both with all there is: forward, loss, backward, clip, AdamW. Device and host memory are given back. */
export async function runStep(model: CausalLM, c: StepCase, io: StepIo): Promise<StepResult> {
  const base = { tokens: c.tokens, name: nameOf(c), without: c.without, probe: c.probe ?? false };
  let prepared: PreparedStep | undefined;
  try {
    applyCaps(model.device, c);
    prepared = new PreparedStep(model, { ...c, profile: true });
    return { ...base, ...(await measure(prepared, io)) };
  } catch (error) {
    if (!isShort(error)) throw error;
    return { ...base, fits: false, reason: error.message };
  } finally {
    if (prepared) {
      await prepared.sync();
      prepared.dispose();
    }
  }
}

async function measure(
  prepared: PreparedStep,
  { optimizer, onProgress, onEnd, signal }: StepIo,
): Promise<Omit<StepResult, 'tokens' | 'name' | 'without' | 'probe'>> {
  const { model, c, reservation } = prepared;
  const { plan, session } = reservation;
  const onGpu = model.device.startsWith('cuda');
  optimizer.zeroGrad();
  await prepared.step(Math.min(c.tokens, plan.chunk, WARM), undefined, signal);
  optimizer.step({ maxGradNorm: 1 });
  optimizer.zeroGrad();
  await session.schedule.profile();
  await prepared.sync();
  resetPeak();

  const from = performance.now();
  const since = (): number => (performance.now() - from) / 1000;
  const { loss } = await prepared.step(
    c.tokens,
    (text) => onProgress?.(`${text}, ${since().toFixed(0)} s`),
    signal,
    (what, took, at) => {
      if (took >= LONG_SWEEP) onEnd?.(`${what} done in ${took.toFixed(1)} s, ${at.toFixed(1)} s of the step`);
    },
  );
  const stepped = since();
  const { gradNorm } = optimizer.step({ maxGradNorm: 1 });
  await prepared.sync();
  const seconds = since();

  const profile = Object.entries(await session.schedule.profile());
  const layers = c.probe ? Math.min(PROBE_LAYERS, model.layers.length) : model.layers.length;
  const flops = stepFlops(model.config, c.tokens, { layers, kept: plan.keep });
  const ops = c.profileOps ? await opsOf(prepared, optimizer) : undefined;
  const memory = deviceMemory(model.device);
  const driver = processMemory(model.device);
  return {
    fits: true,
    ...{ layers, chunk: plan.chunk, tile: plan.tile, lossChunk: plan.lossChunk, layersPerSegment: plan.segment },
    ...{ kept: plan.keep.layers, keptTokens: plan.keep.tokens },
    ...{ reserveSeconds: prepared.reserveSeconds, seconds, tokensPerSecond: c.tokens / seconds, loss, gradNorm },
    phases: { ...Object.fromEntries(profile.map(([phase, { ms }]) => [phase, ms / 1000])), 'clip and AdamW': seconds - stepped },
    copyWaitSeconds: profile.reduce((sum, [, { waitMs }]) => sum + waitMs / 1000, 0),
    dequantization: await dequantization(prepared, layers),
    ...(onGpu ? { floorSeconds: flops.floorSeconds, overFloor: seconds / flops.floorSeconds } : {}),
    tflops: flops.step / seconds / 1e12,
    vram: {
      driverPeakBytes: onGpu ? driver.peakBytes : null,
      driverSource: driver.source,
      allocatorPeakBytes: memory.peakBytes,
      byLabel: Object.fromEntries(Object.entries(memory.byLabel).map(([label, { peakBytes }]) => [label, peakBytes])),
    },
    hostBytes: { checkpoints: plan.checkpoints.hostBytes + plan.keep.hostBytes, peak: deviceMemory('host').peakBytes },
    checkpoints: plan.checkpoints,
    ...(ops ? { ops } : {}),
    attempts: reservation.attempts.length,
    ...(prepared.warnings.length > 0 ? { warnings: prepared.warnings } : {}),
  };
}

async function opsOf(prepared: PreparedStep, optimizer: AdamW): Promise<OpTime[]> {
  optimizer.zeroGrad();
  const { device } = prepared.model;
  return profileOps(
    device,
    () => prepared.step(prepared.c.tokens),
    () => prepared.sync(),
  );
}

/** Opening a layer forward dequantizes its weights and launches nothing else. */
async function dequantization(
  { model, reservation }: PreparedStep,
  layers: number,
): Promise<{ layerMs: number; passes: number; seconds: number }> {
  const [layer] = model.layers;
  const { workspace, plan } = reservation;
  using clock = new Clock(model.device);
  const open = (): void => {
    const mark = workspace.mark();
    if (layer) layer.close(layer.open(1, 'forward', workspace));
    workspace.reset(mark);
  };
  const layerMs = await clock.time(open, { rounds: 3 });
  const again = (Math.ceil(layers / plan.segment) - 1) * (plan.segment - 1); // recomputed inside segments, but for the last one
  const passes = 2 * layers + again;
  return { layerMs, passes, seconds: (layerMs * passes) / 1000 };
}
