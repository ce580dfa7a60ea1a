/** One training step of a model in memory: reserved, warmed up, timed. What does not fit is an answer, not a failure. */
import type { CausalLM, SequenceLoss, TokenSequence } from '@lc/models';
import type { AdamW } from '@lc/qlora';
import { deviceMemory, empty, fill, LcError, memInfo, resetPeak, Scope } from '@lc/tensor';
import { planStep, type Reservation, type ReserveOptions, reserveStep } from '../reserve.js';
import { Clock } from './clock.js';
import { stepFlops } from './flops.js';
import { PhaseClock } from './phase-clock.js';
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
  /** Layers whose attention output was kept for backward. */
  kept?: number;
  reserveSeconds?: number;
  seconds?: number;
  tokensPerSecond?: number;
  loss?: number;
  gradNorm?: number;
  /** Device time. */
  phases?: Record<string, number>;
  /** Weights to the compute dtype: of one layer, measured apart, and that times the passes of the step. */
  dequantization?: { layerMs: number; passes: number; seconds: number };
  /** Seconds that the compute stream waited for copies. */
  copyWaitSeconds?: number;
  floorSeconds?: number;
  /** seconds / floorSeconds. */
  overFloor?: number;
  /** The floor's FLOPs over the seconds. */
  tflops?: number;
  vram?: { driverPeakBytes: number | null; allocatorPeakBytes: number; byLabel: Record<string, number> };
  /** Of the activation store, and all that lc's allocator pinned. */
  hostBytes?: { checkpoints: number; peak: number };
  checkpoints?: { deviceBytes: number; hostBytes: number };
  warnings?: string[];
}

export interface StepIo {
  optimizer: AdamW;
  /** Told what goes on, at most once per chunk. */
  onProgress?: (text: string) => void;
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

function reserveOptions(model: CausalLM, c: StepCase, alreadyTaken: boolean): ReserveOptions {
  const { wholeLogitsBytes, ...sizes } = sizesOf(model, c);
  const onGpu = model.device.startsWith('cuda');
  const { freeBytes, totalBytes } = memInfo(onGpu ? model.device : 'cpu');
  // Whole logits lie beside the plan. A limit on a GPU counts everything taken; on the CPU it does not.
  const beside = wholeLogitsBytes > 0 && !(alreadyTaken && onGpu);
  const vramLimit = beside ? Math.min(c.vram ?? Number.POSITIVE_INFINITY, onGpu ? totalBytes : freeBytes) - wholeLogitsBytes : c.vram;
  return {
    ...{ model, tokens: c.tokens, vramLimit, ramLimit: c.ram, layersPerSegment: c.layersPerSegment },
    ...{ keep: c.keep, deterministic: !c.nondeterministic },
    ...sizes,
  };
}

/** The plan alone: nothing is taken. */
export function fits(model: CausalLM, c: StepCase): boolean {
  return sizesOf(model, c).wholeLogitsBytes < memInfo(model.device).totalBytes && planStep(reserveOptions(model, c, false)).fits;
}

/** A case's memory, held until disposed. */
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
      const { wholeLogitsBytes } = sizesOf(model, c);
      if (wholeLogitsBytes > 0) {
        // Filled, so that the memory is really there; our kernel writes the gradient over the logits and needs no second array.
        fill(this.scope.own(empty([wholeLogitsBytes], { dtype: 'u8', device: model.device, label: 'whole logits' })), 0);
      }
      this.reservation = this.scope.own(
        reserveStep({ ...reserveOptions(model, c, true), onWarning: (message) => this.warnings.push(message) }),
      );
    } catch (error) {
      this.scope.dispose();
      throw error;
    }
    this.reserveSeconds = (performance.now() - from) / 1000;
  }

  /** One pass through forward, loss and backward: gradients are added up. */
  async step(tokens: number, onPhase?: (phase: string, layer: number, share: number) => void, signal?: AbortSignal): Promise<SequenceLoss> {
    const { model, c, reservation } = this;
    model.setTile(reservation.plan.tile); // another case may have changed it
    return reservation.session.step(sequenceOf(model, tokens), {
      ...(c.probe ? { layers: Math.min(PROBE_LAYERS, model.layers.length) } : {}),
      signal,
      onProgress: ({ phase, layer, done, total }) => onPhase?.(phase, layer, done / total),
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

const usedOn = (device: string): number => {
  const { freeBytes, totalBytes } = memInfo(device as 'cuda');
  return totalBytes - freeBytes;
};

/** A warm-up of at most 1,024 tokens, then the timed step: forward, loss, backward, clip, AdamW. Device and host memory are given back. */
export async function runStep(model: CausalLM, c: StepCase, io: StepIo): Promise<StepResult> {
  const base = { tokens: c.tokens, name: nameOf(c), without: c.without, probe: c.probe ?? false };
  let prepared: PreparedStep | undefined;
  try {
    prepared = new PreparedStep(model, c);
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
  { optimizer, onProgress, signal }: StepIo,
): Promise<Omit<StepResult, 'tokens' | 'name' | 'without' | 'probe'>> {
  const { model, c, reservation } = prepared;
  const { plan, workspace } = reservation;
  const onGpu = model.device.startsWith('cuda');
  optimizer.zeroGrad();
  await prepared.step(Math.min(c.tokens, 1024));
  optimizer.zeroGrad();
  await prepared.sync();
  resetPeak();

  let driverPeak = onGpu ? usedOn(model.device) : 0;
  let lastLook = 0;
  using clock = new PhaseClock(workspace.stream, onGpu);
  const from = performance.now();
  clock.start();
  const { loss } = await prepared.step(
    c.tokens,
    (phase, layer, share) => {
      clock.mark(phase);
      const now = performance.now();
      if (now - lastLook < 100) return;
      lastLook = now;
      if (onGpu) driverPeak = Math.max(driverPeak, usedOn(model.device));
      onProgress?.(
        `${phase}${layer < 0 ? '' : `, layer ${layer}`}, ${(100 * share).toFixed(0)}% of the pass, ${((now - from) / 1000).toFixed(0)} s`,
      );
    },
    signal,
  );
  const { gradNorm } = optimizer.step({ maxGradNorm: 1 });
  clock.mark('clip and AdamW');
  await prepared.sync();
  const seconds = (performance.now() - from) / 1000;
  clock.finish();
  if (onGpu) driverPeak = Math.max(driverPeak, usedOn(model.device));
  const memory = deviceMemory(model.device);
  const layers = c.probe ? Math.min(PROBE_LAYERS, model.layers.length) : model.layers.length;
  const flops = stepFlops(model.config, c.tokens, { layers, kept: plan.keep.layers });
  return {
    fits: true,
    ...{ layers, chunk: plan.chunk, tile: plan.tile, lossChunk: plan.lossChunk, layersPerSegment: plan.segment, kept: plan.keep.layers },
    ...{ reserveSeconds: prepared.reserveSeconds, seconds, tokensPerSecond: c.tokens / seconds, loss, gradNorm },
    phases: clock.seconds,
    dequantization: await dequantization(prepared, layers),
    ...(onGpu ? { floorSeconds: flops.floorSeconds, overFloor: seconds / flops.floorSeconds } : {}),
    tflops: flops.step / seconds / 1e12,
    vram: {
      driverPeakBytes: onGpu ? driverPeak : null,
      allocatorPeakBytes: memory.peakBytes,
      byLabel: Object.fromEntries(Object.entries(memory.byLabel).map(([label, { peakBytes }]) => [label, peakBytes])),
    },
    hostBytes: {
      checkpoints: plan.checkpoints.hostBytes + plan.keep.hostBytes,
      peak: deviceMemory('host').peakBytes,
    },
    checkpoints: plan.checkpoints,
    ...(prepared.warnings.length > 0 ? { warnings: prepared.warnings } : {}),
  };
}

/** Opening a layer dequantizes its weights and does little else. */
async function dequantization({ model, reservation }: PreparedStep, layers: number): Promise<StepResult['dequantization']> {
  const [layer] = model.layers;
  if (!layer) return undefined;
  const { workspace, plan } = reservation;
  using clock = new Clock(model.device);
  const layerMs = await clock.time(
    () => {
      const mark = workspace.mark();
      layer.close(layer.open(1, 'forward', workspace));
      workspace.reset(mark);
    },
    { rounds: 3 },
  );
  const again = plan.segment > 1 ? layers - Math.ceil(layers / plan.segment) : 0; // recomputed inside segments
  const passes = 2 * layers + again;
  return { layerMs, passes, seconds: (layerMs * passes) / 1000 };
}
