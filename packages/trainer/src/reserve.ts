/**
 * The plan of a training step, and its memory taken before the step's first launch. Only reservation can fail; then the plan shrinks, where that costs the least
 * speed, and nothing has been computed. `SFTTrainer` and `lc bench step` share it.
 */
import { type CausalLM, TrainingSession } from '@lc/models';
import { type Device, isPinned, LcError, Scope, Workspace } from '@lc/tensor';
import { type ModelShape, type Plan, type PlanOptions, plan } from '@lc/vram-probe';
import { applyLimits, type Budget, BudgetSearch, type Budgets, isOutOfMemory, measureBudgets } from './budgets.js';
import { isPrepared, loraOf, shapeOf } from './model-shape.js';

/** Model, length, and what may be taken. */
export interface ReserveOptions {
  /** Loaded, with its adapter: what it holds is not planned again. */
  model: CausalLM;
  /** Default: the model's own. */
  shape?: ModelShape;
  /** Longest sequence. */
  tokens: number;
  /** Fix a size instead of choosing it. */
  chunk?: number | undefined;
  tile?: number | undefined;
  lossChunk?: number | undefined;
  /** Bytes of gradient checkpoints on the device. Default: what is left of it, up to all. */
  checkpointDeviceBytes?: number | undefined;
  /**
   * Layers without a window whose attention output is kept for backward, of each the last so many tokens in whole chunks (a number of layers: all tokens); 'auto' (default): of all of
   * them as many tokens as fit. It changes no result.
   */
  keep?: PlanOptions['keep'] | undefined;
  /** 'auto': what makes the step fastest. Default 1. It changes no result. */
  layersPerSegment?: number | 'auto' | undefined;
  /**
   * Bytes of device memory that the process may take in all, context and libraries included: set for the allocator (`setVramLimit`), and left set. null lifts a limit.
   * Default: as it is. On the CPU: RAM for what this reservation takes.
   */
  vramLimit?: number | null | undefined;
  /** Bytes of RAM that lc's allocator may take in all (`setRamLimit`), likewise. Plans take at most 90% of the RAM that is free. */
  ramLimit?: number | null | undefined;
  /** Leave room for an AdamW that is not made yet. Default: it is there already (or there is none). */
  optimBits?: 8 | 32 | undefined;
  /** Only `evaluate` will be called: no checkpoints. */
  evaluateOnly?: boolean | undefined;
  /** 'require': host memory that cannot be pinned counts as a failed reservation. Default 'prefer': pageable memory is taken, with a warning. */
  pinning?: 'prefer' | 'require' | undefined;
  /** See `TrainingSession`. Default true. */
  deterministic?: boolean | undefined;
  /** As for `LayerSchedule`. */
  prefetchAhead?: number | undefined;
  verifyRecompute?: boolean | undefined;
  /** Time phases and waits for copies, for `session.schedule.profile()`. */
  profile?: boolean | undefined;
  /** Told about reservations that failed before one succeeded, and once about memory that is not pinned and about a workspace that the plan made too small. */
  onWarning?: ((message: string) => void) | undefined;
  /** What is free, in bytes. For tests; default: measured, less a margin. */
  budgets?: Budgets | (() => Budgets) | undefined;
}

/** A plan whose memory was not there. */
export interface Attempt {
  plan: Plan;
  failed: Budget;
  message: string;
}

/** The memory of a step, taken. Dispose it at the end. */
export interface Reservation extends Disposable {
  readonly plan: Plan;
  readonly workspace: Workspace;
  readonly session: TrainingSession;
  /** Plans that did not find the memory they counted on. */
  readonly attempts: readonly Attempt[];
  /** Gives the memory back. */
  dispose(): void;
}

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;
const MAX_ATTEMPTS = 16;

/** What a plan may count on now. */
export const budgetsOf = (o: ReserveOptions): Budgets =>
  typeof o.budgets === 'function' ? o.budgets() : (o.budgets ?? measureBudgets(o.model.device, o));

function planOptions(o: ReserveOptions, device: Device, budgets: Budgets): PlanOptions {
  const { model } = o;
  const onGpu = device.startsWith('cuda');
  const shape = o.shape ?? shapeOf(model);
  const act = onGpu ? 'bf16' : 'f32';
  const fixed = { chunk: o.chunk, tile: o.tile, lossChunk: o.lossChunk, checkpointDeviceBytes: o.checkpointDeviceBytes };
  return {
    model: o.evaluateOnly ? { ...shape, numHiddenLayers: 1 } : shape,
    tokens: o.tokens,
    device: onGpu ? 'cuda' : 'cpu',
    vramBudget: budgets.vram,
    ramBudget: budgets.ram,
    lora: loraOf(model),
    trainableParameters: model.parameters.reduce((sum, p) => sum + p.value.numel, 0),
    quantization: isPrepared(model, act) ? '4bit' : 'none',
    // Loaded already, so no longer part of what is free; likewise the context, but for what its libraries take at their first use.
    weightBytes: 0,
    adapterBytes: 0,
    ...(o.optimBits ? { optimBits: o.optimBits } : { optimizerBytes: 0 }),
    contextBytes: onGpu ? LIBRARIES : 0,
    keep: o.evaluateOnly ? 0 : (o.keep ?? 'auto'),
    layersPerSegment: o.evaluateOnly ? 1 : (o.layersPerSegment ?? 1),
    deterministic: o.deterministic ?? true,
    ...(Object.fromEntries(Object.entries(fixed).filter(([, value]) => value !== undefined)) as Partial<typeof fixed> as object),
  };
}
/** cuBLASLt's workspace, products cut along k, kernels that are loaded at their first launch. */
const LIBRARIES = 192 << 20;

/** Which budget an allocator's error is about. */
const budgetOf = (error: LcError): Budget => (/ on cuda:\d+|VRAM/.test(error.message) ? 'VRAM' : 'RAM');

/** What `reserveStep` would begin with, from what is free now: nothing is taken. `maxTokens` is not searched. @throws ERR_LC_ARGUMENT */
export function planStep(o: ReserveOptions): Plan {
  return plan({ ...planOptions(o, o.model.device, budgetsOf(o)), maxTokens: false });
}

/**
 * Chooses chunk, tile, loss-chunk and store sizes from what is free, and takes all of a step's memory: activation store, sequence buffers, and the workspace in one
 * piece, so that nothing grows during a step. When that fails it measures again, plans smaller and says so (`onWarning`): the fastest step in what there
 * is, by `plan` of `@lc/vram-probe`. Sets the model's MLP tile.
 *
 * @throws ERR_LC_PLAN naming the budget (VRAM, RAM or pinned) and the longest length that fits; ERR_LC_OUT_OF_MEMORY when reservations keep failing;
 *   ERR_LC_ARGUMENT
 */
export function reserveStep(o: ReserveOptions): Reservation {
  const { device } = o.model;
  const attempts: Attempt[] = [];
  applyLimits(device, o);
  const search = new BudgetSearch(() => budgetsOf(o), device.startsWith('cuda'));
  for (;;) {
    const p = plan({ ...planOptions(o, device, search.budgets), maxTokens: false });
    if (p.fits) {
      try {
        const reservation = take(o, p, attempts);
        if (attempts.length > 0) o.onWarning?.(plannedSmaller(p, attempts));
        return reservation;
      } catch (error) {
        if (!isOutOfMemory(error)) throw error;
        const failed = error instanceof NotPinned ? 'pinned' : budgetOf(error);
        attempts.push({ plan: p, failed, message: error.message });
        if (attempts.length >= MAX_ATTEMPTS) throw doesNotFit(o, search.least(), attempts);
        search.failed(p, failed, attempts.length);
      }
    } else if (!search.tooLittle()) {
      throw doesNotFit(o, search.least(), attempts);
    }
  }
}

function plannedSmaller(p: Plan, attempts: readonly Attempt[]): string {
  const sizes = (of: Plan): string =>
    `chunk ${of.chunk}, tile ${of.tile}, loss chunk ${of.lossChunk}, ${gib(of.predictedPeak.device)} on the device and ${gib(of.predictedPeak.host)} in RAM`;
  const [first, last] = [attempts[0] as Attempt, attempts.at(-1) as Attempt];
  return (
    `less memory could be taken than was planned: ${attempts.length} reservation${attempts.length > 1 ? 's' : ''} failed (${sizes(first.plan)}; ` +
    `${last.failed}: ${last.message}). The step runs with a smaller plan: ${sizes(p)}`
  );
}

class NotPinned extends LcError {
  constructor(bytes: number) {
    super('ERR_LC_OUT_OF_MEMORY', `pinned: ${gib(bytes)} of host memory for gradient checkpoints could not be pinned`);
  }
}

function take(o: ReserveOptions, p: Plan, attempts: readonly Attempt[]): Reservation {
  const { model } = o;
  const scope = new Scope();
  try {
    const warned = new Set<string>();
    const warn = (kind: string, message: string): void => {
      if (!warned.has(kind)) o.onWarning?.(message);
      warned.add(kind);
    };
    const workspace = scope.own(
      new Workspace({
        device: model.device,
        label: 'workspace',
        bytes: p.bytes.workspace,
        onGrow: ({ capacity, what }) =>
          warn(
            'grow',
            `the workspace of ${gib(p.bytes.workspace)} was too small (for ${what}) and grew to ${gib(capacity)}: the plan was wrong; please report the model and the sizes`,
          ),
      }),
    );
    model.setTile(p.tile);
    const session = scope.own(
      new TrainingSession({
        ...{ model, tokens: o.tokens, chunk: p.chunk, lossChunk: p.lossChunk, ws: workspace },
        storeOptions: { deviceBytes: p.checkpoints.deviceBytes, layersPerSegment: p.segment },
        ...(p.keep.layers > 0 ? { keep: { layers: p.keep.layers, tokens: p.keep.tokens, deviceBytes: p.keep.deviceBytes } } : {}),
        deterministic: o.deterministic ?? true,
        ...(o.prefetchAhead === undefined ? {} : { prefetchAhead: o.prefetchAhead }),
        ...(o.verifyRecompute === undefined ? {} : { verifyRecompute: o.verifyRecompute }),
        ...(o.profile === undefined ? {} : { profile: o.profile }),
        ...(o.evaluateOnly === undefined ? {} : { evaluateOnly: o.evaluateOnly }),
      }),
    );
    const pageable = pageableBytes(session);
    if (pageable > 0 && model.device.startsWith('cuda')) {
      if (o.pinning === 'require') throw new NotPinned(pageable);
      warn(
        'pinned',
        `${gib(pageable)} of host memory for gradient checkpoints could not be pinned: copies are slower and not hidden behind the computation. ` +
          'Raise the limit of locked memory (ulimit -l, or the container), or keep less in host memory',
      );
    }
    return {
      plan: p,
      workspace,
      session,
      attempts,
      dispose: () => scope.dispose(),
      [Symbol.dispose]: () => scope.dispose(),
    };
  } catch (error) {
    scope.dispose();
    throw error;
  }
}

/** Bytes of the store's host tier that are not pinned. */
function pageableBytes({ schedule: { store } }: TrainingSession): number {
  const chunks = [...store.checkpoints.flat(), ...store.dx, ...store.scratch.flat()];
  return chunks.reduce((sum, { tier, home }) => sum + (tier === 'host' && !isPinned(home) ? home.nbytes : 0), 0);
}

function doesNotFit(o: ReserveOptions, budgets: Budgets, attempts: readonly Attempt[]): LcError {
  const p = plan(planOptions(o, o.model.device, budgets));
  const last = attempts.at(-1);
  const after = last ? ` After ${attempts.length} smaller plans; the last reservation failed: ${last.failed}: ${last.message}.` : '';
  const reasons = p.reasons.length > 0 ? p.reasons : [`${last?.failed}: the reservation failed`];
  const named = last && !reasons.some((reason) => reason.startsWith(last.failed)) ? [`${last.failed} ran out`, ...reasons] : reasons;
  const longest = last ? longestReserved(o, budgets, last.failed) : p.maxTokens;
  return new LcError(
    p.fits ? 'ERR_LC_OUT_OF_MEMORY' : 'ERR_LC_PLAN',
    `${o.tokens} tokens do not fit: ${named.join('; ')}. The longest length that fits: ${longest}.${after}`,
  );
}

/** The longest length of budgets that were promised and may not be there: tried, and with 5% less of what ran out until it is had. */
function longestReserved(o: ReserveOptions, promised: Budgets, failed: Budget): number {
  const onGpu = o.model.device.startsWith('cuda');
  const budgets = { ...promised };
  for (let tries = 0; tries < 60; tries++) {
    const tokens = Math.min(o.tokens, plan(planOptions(o, o.model.device, budgets)).maxTokens);
    if (tokens < 1) return 0;
    const shorter = { ...o, tokens, onWarning: undefined };
    try {
      take(shorter, plan({ ...planOptions(shorter, o.model.device, budgets), maxTokens: false }), []).dispose();
      return tokens;
    } catch (error) {
      if (!isOutOfMemory(error)) throw error;
    }
    if (!onGpu || failed === 'VRAM') budgets.vram *= 0.95;
    if (!onGpu || failed !== 'VRAM') budgets.ram *= 0.95;
  }
  return 0;
}
