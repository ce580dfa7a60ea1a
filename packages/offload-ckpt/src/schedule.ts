import { type Kept, type Layer, type LayerState, LcTypeError, type Span, type Workspace } from '@lc/tensor';
import { KeptRows } from './kept.js';
import type { HiddenCallback, InputGradientCallback, LayerScheduleOptions, LossCallback, SequenceOptions, WriteInput } from './options.js';
import { makeSpans, requireCount } from './plan.js';
import { Profiler, type ScheduleProfile } from './profile.js';
import { drain, Pacer, type Progress, type RunOptions } from './run.js';
import type { StoredChunk } from './slots.js';
import { ActivationStore } from './store.js';
import { buildPasses, type Op, type Passes, type PassPlan, prefetch, type Sweep } from './sweeps.js';
import { RecomputeCheck } from './verify.js';

type Handler = (op: Op, at: Span, sweep: Sweep, state: LayerState | null) => void;

/**
 * The layers x chunks schedule: the exact gradient of a whole sequence, one layer and one chunk at a time.
 *
 *     forward :  for layer 0..L-1 : for chunk 0..n-1 : x[l+1,c] = layer.forward(x[l,c])        (K, V of one layer at a time)
 *     loss    :  for every chunk  : dx[L,c]
 *     backward:  for layer L-1..0 : chunks 0..n-1: fill K, V from x[l,c];  chunks n-1..0: dx[l,c] overwrites dx[l+1,c]
 *
 * Layer inputs lie in an `ActivationStore`. Calls only enqueue; the `...Async` forms give control back to the event loop after every chunk, keep at
 * most two chunks queued ahead, and stop at an AbortSignal with everything put away. After an error or abort, start again with `forward`.
 */
export class LayerSchedule implements Disposable {
  readonly store: ActivationStore;
  readonly layers: readonly Layer[];
  private readonly ws: Workspace;
  private readonly ownsStore: boolean;
  /** Calls ahead that host-tier chunks are asked for: in backward, which writes nothing through the staging slots (unless dx or scratch are there), as many as they can hold. */
  private readonly ahead: { forward: number; backward: number };
  private readonly evaluateOnly: boolean;
  private readonly check: RecomputeCheck | null;
  private readonly kept: KeptRows | null;
  private readonly pacer: Pacer;
  private readonly profiler: Profiler | null;
  private sequenceSpans: Span[] = [];
  private evaluationSpans: Span[] = [];
  private passes!: Passes;
  private layersOfPasses = 0;
  private keptFromOfPasses = 0;
  private phase: 'idle' | 'forward' | 'loss' = 'idle';
  private running = false;

  /** @throws LcTypeError ERR_LC_ARGUMENT, ERR_LC_SHAPE; LcError ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY */
  constructor(options: LayerScheduleOptions) {
    const { layers, tokens, chunk, width, ws } = options;
    if (layers.length === 0) throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule: layers is empty; give at least one Layer');
    for (const name of ['tokens', 'chunk', 'width'] as const) requireCount('LayerSchedule', name, options[name]);
    if (options.store && options.storeOptions)
      throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule: give store or storeOptions, not both');
    this.layers = layers;
    this.ws = ws;
    this.evaluateOnly = options.evaluateOnly ?? false;
    this.ownsStore = !options.store;
    this.store =
      options.store ??
      new ActivationStore({
        device: ws.device,
        dtype: ws.dtype,
        computeStream: ws.stream,
        ...options.storeOptions,
        layersPerSegment: this.evaluateOnly ? 1 : (options.storeOptions?.layersPerSegment ?? 1),
        layers: this.evaluateOnly ? 1 : layers.length,
        tokens,
        chunk,
        width,
      });
    const { store } = this;
    const wantLayers = this.evaluateOnly ? store.layers : layers.length;
    if (store.layers !== wantLayers || store.chunk !== chunk || store.width !== width || store.tokens < tokens) {
      throw new LcTypeError(
        'ERR_LC_SHAPE',
        `LayerSchedule: expected a store for ${layers.length} layers, chunks of ${chunk}, width ${width} and ${tokens} tokens or more, ` +
          `got one for ${store.layers} layers, chunks of ${store.chunk}, width ${store.width} and ${store.tokens} tokens`,
      );
    }
    this.check = null;
    this.kept = null;
    this.profiler = options.profile ? new Profiler(store.compute, () => store.makeEvent({ timing: true })) : null;
    store.profiler = this.profiler;
    try {
      if (options.keep && !this.evaluateOnly) this.kept = KeptRows.make(layers, store, options.keep);
      if (this.kept) this.kept.store.profiler = this.profiler;
      const throughSlots = [...store.dx, ...store.scratch.flat()].some(({ tier }) => tier === 'host');
      const slots = Math.max(store.plan.stagingSlots, this.kept?.store.plan.stagingSlots ?? 0);
      const { prefetchAhead } = options;
      this.ahead = { forward: prefetchAhead ?? 1, backward: prefetchAhead ?? (throughSlots ? 1 : Math.max(1, slots - 1)) };
      if (options.verifyRecompute) this.check = new RecomputeCheck(store);
      this.pacer = new Pacer(store);
      this.begin({ tokens, docStart: options.docStart ?? null, dropoutSeed: options.dropoutSeed });
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** The chunks of the current sequence, left to right. */
  get spans(): readonly Span[] {
    return this.sequenceSpans;
  }

  /** Sets the next sequence; call it before `forward` when its length, documents or dropout seed differ. @throws LcTypeError ERR_LC_ARGUMENT, ERR_LC_SHAPE */
  begin(options: SequenceOptions = {}): void {
    this.refuseWhileRunning();
    const { tokens = this.store.tokens, docStart = null, dropoutSeed, layers = this.layers.length } = options;
    requireCount('LayerSchedule.begin', 'tokens', tokens);
    requireCount('LayerSchedule.begin', 'layers', layers);
    if (layers > this.layers.length)
      throw new LcTypeError('ERR_LC_ARGUMENT', `LayerSchedule.begin: layers is ${layers}, the schedule has ${this.layers.length}`);
    if (docStart && (docStart.dtype !== 'i32' || docStart.shape.length !== 1 || docStart.shape[0] !== tokens)) {
      throw new LcTypeError('ERR_LC_SHAPE', `LayerSchedule.begin: docStart must be i32 [${tokens}], got ${docStart}`);
    }
    this.reset(tokens);
    const chunks = Math.ceil(tokens / this.store.chunk);
    const keptFrom = this.kept?.from ?? 0;
    if (chunks !== this.sequenceSpans.length || layers !== this.layersOfPasses || keptFrom !== this.keptFromOfPasses) {
      this.layersOfPasses = layers;
      this.keptFromOfPasses = keptFrom;
      this.passes = buildPasses(this.store, {
        ...{ layers, chunks, verify: this.check !== null, evaluateOnly: this.evaluateOnly },
        keptRow: (layer) => this.kept?.row(layer) ?? null,
      });
    }
    this.sequenceSpans = makeSpans(tokens, this.store.chunk, docStart, dropoutSeed);
    this.evaluationSpans = makeSpans(tokens, this.store.chunk, docStart);
    this.phase = 'idle';
  }

  /** Runs every layer over every chunk and keeps the checkpoints. */
  forward(writeInput: WriteInput, options?: RunOptions): void {
    drain(this.forwardSteps(writeInput), options);
  }
  /** `forward` that returns to the event loop after every chunk. @throws ERR_LC_ABORTED */
  forwardAsync(writeInput: WriteInput, options?: RunOptions): Promise<void> {
    return this.pacer.run(this.forwardSteps(writeInput), options);
  }

  /** Hands out every chunk of the last layer's output, left to right, with the place for its gradient. After `forward`. */
  loss(callback: LossCallback, options?: RunOptions): void {
    drain(this.lossSteps(callback), options);
  }
  /** `loss` that returns to the event loop after every chunk. @throws ERR_LC_ABORTED */
  lossAsync(callback: LossCallback, options?: RunOptions): Promise<void> {
    return this.pacer.run(this.lossSteps(callback), options);
  }

  /** Adds to every layer's parameter gradients. After `loss`. */
  backward(onInputGradient?: InputGradientCallback, options?: RunOptions): void {
    drain(this.backwardSteps(onInputGradient), options);
  }
  /** `backward` that returns to the event loop after every chunk. @throws ERR_LC_ABORTED */
  backwardAsync(onInputGradient?: InputGradientCallback, options?: RunOptions): Promise<void> {
    return this.pacer.run(this.backwardSteps(onInputGradient), options);
  }

  /** Evaluation: no dropout, no checkpoints (two rows of the store take turns). Hands out every chunk of the last layer's output. */
  forwardOnly(writeInput: WriteInput, onHidden: HiddenCallback, options?: RunOptions): void {
    drain(this.forwardOnlySteps(writeInput, onHidden), options);
  }
  /** `forwardOnly` that returns to the event loop after every chunk. @throws ERR_LC_ABORTED */
  forwardOnlyAsync(writeInput: WriteInput, onHidden: HiddenCallback, options?: RunOptions): Promise<void> {
    return this.pacer.run(this.forwardOnlySteps(writeInput, onHidden), options);
  }

  /**
   * Device time by phase, and what of it the compute stream waited for copies, since the last call; made with `profile`. Waits for the device. On the CPU,
   * where launches are complete when they return, it is the time of the calls.
   * @throws LcTypeError ERR_LC_ARGUMENT
   */
  profile(): Promise<ScheduleProfile> {
    if (!this.profiler) throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule.profile: made without profile: true; nothing was timed');
    return this.profiler.read();
  }

  /** Frees the store if this schedule made it. On a GPU, `await schedule.store.sync()` first if a step may be in flight. */
  dispose(): void {
    this.store.profiler = null;
    this.profiler?.dispose();
    this.check?.dispose();
    this.kept?.dispose();
    this.pacer?.dispose();
    if (this.ownsStore) this.store?.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private *forwardSteps(writeInput: WriteInput): Generator<Progress> {
    if (this.evaluateOnly)
      throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule.forward: made with evaluateOnly, it keeps no checkpoints; use forwardOnly');
    yield* this.fromScratch(this.passes.forward, this.sequenceSpans, this.forwardHandler(writeInput, true));
    this.phase = 'forward';
  }

  private *lossSteps(callback: LossCallback): Generator<Progress> {
    if (this.phase !== 'forward')
      throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule.loss: no forward to take it from; call forward first');
    this.phase = 'idle';
    yield* this.run(this.passes.loss, this.sequenceSpans, (op, at) => {
      const place = this.store.update(op.y as StoredChunk);
      // The last layer's output lies where its gradient goes; a copy lets the callback write one while it reads the other.
      this.ws.scoped(() => {
        const hidden = this.ws.alloc(place.shape, place.dtype);
        this.store.compute.copy(hidden, place);
        callback(hidden, place, at);
      });
      this.store.commit(op.y as StoredChunk);
    });
    this.phase = 'loss';
  }

  private *backwardSteps(onInputGradient?: InputGradientCallback): Generator<Progress> {
    if (this.phase !== 'loss')
      throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule.backward: no gradient to start from; call forward and loss first');
    this.phase = 'idle';
    const { store, ws, check } = this;
    const again = this.forwardHandler(null, false);
    yield* this.run(this.passes.backward, this.sequenceSpans, (op, at, sweep, state) => {
      if (op.kind === 'recompute') return again(op, at, sweep, state);
      const layer = this.layerOf(sweep);
      const x = store.read(op.x as StoredChunk);
      if (op.kind === 'fill') layer.fill(x, at, state as LayerState, ws);
      else if (op.kind === 'verify') {
        ws.scoped(() => {
          const out = ws.alloc(x.shape, x.dtype);
          layer.forward(x, out, at, state as LayerState, ws);
          check?.compare(sweep.layer, at.start, out);
        });
      } else {
        const dx = store.update(op.y as StoredChunk);
        this.withKept(op, (kept) => layer.backward(x, dx, dx, at, state as LayerState, ws, kept));
        if (sweep.layer === 0) onInputGradient?.(dx, at);
        store.commit(op.y as StoredChunk);
      }
      store.release(op.x as StoredChunk);
    });
  }

  private *forwardOnlySteps(writeInput: WriteInput, onHidden: HiddenCallback): Generator<Progress> {
    const forward = this.forwardHandler(writeInput, false);
    yield* this.fromScratch(this.passes.forwardOnly, this.evaluationSpans, (op, at, sweep, state) => {
      if (op.kind !== 'hidden') return forward(op, at, sweep, state);
      onHidden(this.store.read(op.x as StoredChunk), at);
      this.store.release(op.x as StoredChunk);
    });
  }

  /** 'input', 'forward' and 'recompute'. `keep`: outputs to verify recomputation against are kept. */
  private forwardHandler(writeInput: WriteInput | null, keep: boolean): Handler {
    const { store, ws, check } = this;
    return (op, at, sweep, state) => {
      const x = op.x ? store.read(op.x) : null;
      const out = store.write(op.y as StoredChunk);
      if (x) {
        this.withKept(op, (kept) => this.layerOf(sweep).forward(x, out, at, state as LayerState, ws, kept));
        if (keep) check?.keep(sweep.layer, at.start, out);
        if (op.kind === 'recompute') check?.compare(sweep.layer, at.start, out);
      } else writeInput?.(out, at);
      if (op.x) store.release(op.x);
      store.commit(op.y as StoredChunk);
    };
  }

  /** Gives a layer call the place of what it keeps: to fill in the forward, to read after it. */
  private withKept(op: Op, call: (kept: Kept | null) => void): void {
    const store = this.kept?.store;
    const entry = op.kept;
    const filled = op.kind !== 'forward';
    call(store && entry ? { data: filled ? store.read(entry) : store.write(entry), filled } : null);
    if (!store || !entry) return;
    if (filled) store.release(entry);
    else store.commit(entry);
  }

  private reset(tokens: number): void {
    this.store.reset(tokens);
    this.kept?.reset(tokens);
  }

  private refuseWhileRunning(): void {
    if (this.running) throw new LcTypeError('ERR_LC_ARGUMENT', 'LayerSchedule: a pass is running; await it first');
  }

  private layerOf(sweep: Sweep): Layer {
    return this.layers[sweep.layer] as Layer;
  }

  private *fromScratch(pass: PassPlan, spans: readonly Span[], handler: Handler): Generator<Progress> {
    this.refuseWhileRunning();
    this.phase = 'idle';
    const last = spans[spans.length - 1] as Span;
    this.reset(last.start + last.length);
    yield* this.run(pass, spans, handler);
  }

  /** Opens each sweep's layer, runs its ops, and closes it also when a callback throws or the caller stops. */
  private *run(pass: PassPlan, spans: readonly Span[], handler: Handler): Generator<Progress> {
    this.refuseWhileRunning();
    this.running = true;
    const { store, ws } = this;
    const last = spans[spans.length - 1] as Span;
    const total = pass.ops.length;
    let done = 0;
    try {
      for (const sweep of pass.sweeps) {
        const mark = ws.mark();
        const layer = sweep.layer >= 0 ? this.layerOf(sweep) : null;
        let state: LayerState | null = null;
        try {
          if (layer) this.profiler?.enter('open');
          if (layer && sweep.pass) state = layer.open(last.start + last.length, sweep.pass, ws);
          for (const op of sweep.ops) {
            prefetch(
              store,
              this.kept?.store ?? null,
              pass.ops,
              done,
              pass === this.passes.backward ? this.ahead.backward : this.ahead.forward,
            );
            this.profiler?.enter(op.kind);
            handler(op, spans[op.chunk] as Span, sweep, state);
            done++;
            yield { phase: op.kind, layer: sweep.layer, chunk: op.chunk, done, total };
          }
        } finally {
          if (layer && state) layer.close(state);
          ws.reset(mark);
        }
      }
    } finally {
      this.profiler?.enter(null);
      this.running = false;
    }
  }
}
