import { type ChunkSize, chunkedCrossEntropy, readLossSum, shiftLabels } from '@lc/chunked-ce';
import { LayerSchedule, type LayerScheduleOptions, type RunOptions } from '@lc/offload-ckpt';
import { empty, fill, LcError, LcTypeError, Scope, type Span, type Tensor, upload, type Workspace } from '@lc/tensor';
import type { CausalLM } from './causal-lm.js';

/** One packed sequence: documents one after the other. */
export interface TokenSequence {
  /** [tokens] */
  readonly inputIds: Int32Array;
  /** [tokens], not shifted, -100 where a token is not learnt; position i is scored against the label of i + 1 of the same document. */
  readonly labels: Int32Array;
  /** `[tokens]`, index of the first token of each token's document. Default: one document. */
  readonly docStart?: Int32Array | null;
}

/** Model, lengths and memory of a session. Everything is allocated when it is made. */
export interface TrainingSessionOptions {
  readonly model: CausalLM;
  /** Longest sequence. */
  readonly tokens: number;
  /** Tokens per chunk of the layers x chunks schedule. */
  readonly chunk: number;
  /** Rows of logits alive at once. Default 'auto'. */
  readonly lossChunk?: ChunkSize;
  readonly ws: Workspace;
  /** Tiers of the activation store. Default: everything on the device. */
  readonly storeOptions?: LayerScheduleOptions['storeOptions'];
  /** Keep the attention output of full-attention layers for backward: of how many, of how many last tokens of each, and where. Default: nothing is kept. */
  readonly keep?: LayerScheduleOptions['keep'];
  /** As for `LayerSchedule`. */
  readonly prefetchAhead?: number;
  /** Time phases and waits for copies; `schedule.profile()` reads them. */
  readonly profile?: boolean;
  /** Only `evaluate` will be called: no checkpoints are kept. */
  readonly evaluateOnly?: boolean;
  /**
   * Same sequence, same gradients, bit for bit. Default true. False: on a GPU full attention's backward is faster at head dims up to 64 (on Hopper cards up to 128), sums
   * dQ in no fixed order, and takes f32 scratch for the dQ of a chunk; the CPU is deterministic always.
   */
  readonly deterministic?: boolean;
  /** For tests: hold every recomputed layer output against the forward's, bit for bit. */
  readonly verifyRecompute?: boolean;
}

/** What a step is told beside its sequence. */
export interface StepOptions extends RunOptions {
  /** What the loss is divided by: the supervised tokens of the whole optimizer step. Default: those of this sequence. */
  readonly numTokens?: number;
  /** Seed of this step's dropout; without one nothing is dropped. */
  readonly dropoutSeed?: number;
  /** Run only the first so many layers, in the memory of all: a probe of whether a length fits, not a step. Default: all of them. */
  readonly layers?: number;
}

/** Progress and cancellation of an evaluation. */
export interface EvaluateOptions extends RunOptions {
  readonly numTokens?: number;
  /** Sees the last layer's output (before the final norm) of every chunk, [length, hidden]. */
  readonly onHidden?: (hidden: Tensor, at: Span) => void;
}

/** Loss of one sequence. */
export interface SequenceLoss {
  /** Sum over the supervised tokens / numTokens. */
  readonly loss: number;
  /** Positions with a label, after the shift. */
  readonly supervised: number;
}

/** Supervised positions of a sequence: what `numTokens` is summed from. */
export function countSupervised(sequence: TokenSequence): number {
  return shiftLabels(sequence.labels, sequence.docStart ?? null).reduce((count, label) => count + (label === -100 ? 0 : 1), 0);
}

/**
 * Forward, loss and backward of a model over packed sequences, through the layers x chunks schedule: adds the exact gradient of the whole sequence to
 * `model.parameters[].grad`. Everything it needs is allocated by the constructor and by the workspace's first step; later steps allocate nothing.
 */
export class TrainingSession implements Disposable {
  readonly schedule: LayerSchedule;
  private readonly model: CausalLM;
  private readonly ws: Workspace;
  private readonly lossChunk: ChunkSize;
  private readonly tokens: number;
  private readonly deterministic: boolean;
  private readonly ids: Tensor;
  private readonly labels: Tensor;
  private readonly docs: Tensor;
  /** On a GPU: the running loss, read once at the end. */
  private readonly lossSum: Tensor | null;
  private readonly scope = new Scope();

  /** @throws ERR_LC_ARGUMENT, ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY */
  constructor(options: TrainingSessionOptions) {
    const {
      model,
      tokens,
      chunk,
      ws,
      lossChunk = 'auto',
      storeOptions,
      keep,
      prefetchAhead,
      profile,
      evaluateOnly,
      verifyRecompute,
    } = options;
    this.model = model;
    this.ws = ws;
    this.tokens = tokens;
    this.deterministic = options.deterministic ?? true;
    this.lossChunk = lossChunk;
    try {
      this.schedule = this.scope.own(
        new LayerSchedule({
          ...{ layers: model.layers, tokens, chunk, width: model.config.hiddenSize, ws },
          ...(storeOptions ? { storeOptions } : {}),
          ...(keep ? { keep } : {}),
          ...(prefetchAhead === undefined ? {} : { prefetchAhead }),
          ...(profile ? { profile } : {}),
          ...(evaluateOnly ? { evaluateOnly } : {}),
          ...(verifyRecompute ? { verifyRecompute } : {}),
        }),
      );
      const onGpu = ws.device.startsWith('cuda');
      const perToken = (): Tensor => this.scope.own(empty([tokens], { dtype: 'i32', device: ws.device, label: 'sequence' }));
      this.ids = perToken();
      this.docs = perToken();
      // The host chooses the rows that are scored, so on a GPU the labels stay with it.
      this.labels = this.scope.own(empty([tokens], { dtype: 'i32', device: onGpu ? 'host' : ws.device, label: 'sequence' }));
      this.lossSum = onGpu ? this.scope.own(empty([2], { device: ws.device, label: 'sequence' })) : null;
    } catch (error) {
      this.scope.dispose();
      throw error;
    }
  }

  /** Adds this sequence's gradients. @throws ERR_LC_ARGUMENT, ERR_LC_NOTHING_SUPERVISED, ERR_LC_ABORTED (no gradient of this step is then complete) */
  async step(sequence: TokenSequence, options: StepOptions = {}): Promise<SequenceLoss> {
    const { dropoutSeed, layers, ...run } = options;
    const { docStart, tokens, numTokens, supervised } = this.begin('step', sequence, options.numTokens);
    const { model, schedule, ws } = this;
    model.setDeterministic(this.deterministic);
    schedule.begin({ tokens, docStart, dropoutSeed, layers });
    let loss = 0;
    await schedule.forwardAsync((out, at) => model.embedForward(this.ids.rows(at.start, at.length), out), run);
    await schedule.lossAsync((hidden, dHidden, at) => {
      ws.scoped(() => {
        const normed = ws.alloc(hidden.shape);
        model.finalNormForward(hidden, normed);
        loss += this.crossEntropy(normed, normed, at, numTokens);
        model.finalNormBackward(hidden, normed, dHidden);
      });
    }, run);
    await schedule.backwardAsync(undefined, run);
    return { loss: this.lossSum ? readLossSum(this.lossSum) / numTokens : loss, supervised };
  }

  /** The loss alone: no gradients, no dropout, no checkpoints. @throws ERR_LC_ARGUMENT, ERR_LC_NOTHING_SUPERVISED, ERR_LC_ABORTED */
  async evaluate(sequence: TokenSequence, options: EvaluateOptions = {}): Promise<SequenceLoss> {
    const { onHidden, ...run } = options;
    const { docStart, tokens, numTokens, supervised } = this.begin('evaluate', sequence, options.numTokens);
    const { model, schedule, ws } = this;
    schedule.begin({ tokens, docStart });
    let loss = 0;
    await schedule.forwardOnlyAsync(
      (out, at) => model.embedForward(this.ids.rows(at.start, at.length), out),
      (hidden, at) => {
        onHidden?.(hidden, at);
        ws.scoped(() => {
          const normed = ws.alloc(hidden.shape);
          model.finalNormForward(hidden, normed);
          loss += this.crossEntropy(normed, null, at, numTokens);
        });
      },
      run,
    );
    return { loss: this.lossSum ? readLossSum(this.lossSum) / numTokens : loss, supervised };
  }

  /** Gives store, labels and documents back; model and workspace stay their owner's. */
  dispose(): void {
    this.scope.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private crossEntropy(hidden: Tensor, dHidden: Tensor | null, at: Span, numTokens: number): number {
    const labels = this.labels.rows(at.start, at.length);
    return chunkedCrossEntropy({
      hidden,
      weight: this.model.lmHead,
      labels,
      numTokens,
      chunk: this.lossChunk,
      dHidden,
      lossSum: this.lossSum,
      ws: this.ws,
    }).loss;
  }

  private begin(
    op: string,
    sequence: TokenSequence,
    given: number | undefined,
  ): { docStart: Tensor | null; tokens: number; numTokens: number; supervised: number } {
    const { inputIds, labels, docStart = null } = sequence;
    const tokens = inputIds.length;
    const fail = (what: string): never => {
      throw new LcTypeError('ERR_LC_ARGUMENT', `TrainingSession.${op}: ${what}`);
    };
    if (tokens < 1 || tokens > this.tokens) fail(`the sequence has ${tokens} tokens, the session was made for 1 to ${this.tokens}`);
    if (labels.length !== tokens) fail(`labels must have as many entries as inputIds, ${tokens}, got ${labels.length}`);
    if (docStart && docStart.length !== tokens) fail(`docStart must have as many entries as inputIds, ${tokens}, got ${docStart.length}`);
    let longest = docStart ? 0 : tokens;
    if (docStart) for (let i = 0; i < tokens; i++) longest = Math.max(longest, i + 1 - (docStart[i] as number));
    this.model.setSequenceLength(longest);
    const shifted = shiftLabels(labels, docStart);
    let supervised = 0;
    for (const label of shifted) if (label !== -100) supervised++;
    const numTokens = given ?? supervised;
    if (numTokens < 1) {
      throw new LcError(
        'ERR_LC_NOTHING_SUPERVISED',
        `TrainingSession.${op}: all ${tokens} labels are ignored (-100), so there is nothing to learn; check the mask and the chat template`,
      );
    }
    if (this.lossSum) fill(this.lossSum, 0);
    const part = (t: Tensor): Tensor => (tokens === this.tokens ? t : t.rows(0, tokens));
    upload(part(this.ids), inputIds);
    part(this.labels).data<Int32Array>().set(shifted);
    const docs = part(this.docs);
    if (docStart) upload(docs, docStart);
    return { docStart: docStart ? docs : null, tokens, numTokens, supervised };
  }
}
