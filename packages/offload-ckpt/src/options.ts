import type { Layer, Span, Tensor, Workspace } from '@lc/tensor';
import type { ActivationStore, StoreOptions } from './store.js';

/** Writes the first layer's input of a span: `out` [length, width]. */
export type WriteInput = (out: Tensor, at: Span) => void;
/** Reads the last layer's output and writes its gradient, both [length, width] and apart; `hidden` is valid during the call. */
export type LossCallback = (hidden: Tensor, dHidden: Tensor, at: Span) => void;
/** Reads the last layer's output [length, width], valid during the call. */
export type HiddenCallback = (hidden: Tensor, at: Span) => void;
/** Reads the gradient of the first layer's input; spans come right to left. */
export type InputGradientCallback = (dx: Tensor, at: Span) => void;

/** What changes from sequence to sequence. */
export interface SequenceOptions {
  /** Default: as many as the schedule was made for. */
  tokens?: number;
  /** i32 [tokens]: for each token the index of the first token of its document. null: one document. */
  docStart?: Tensor | null;
  /** Seed of this step's dropout; undefined: none. `forwardOnly` never drops out. */
  dropoutSeed?: number | undefined;
  /** Run only the first so many layers, in the memory of all: a probe of whether a length fits. Default: all of them. */
  layers?: number | undefined;
}

/** How much of what layers offer is kept, and where. */
export interface KeepOptions {
  /** The last so many layers of those that offer something. Default: all. */
  layers?: number;
  /**
   * Of each of them the last so many tokens of the sequence, in whole chunks. Default: all. With causal attention the last tokens cost most to compute again: the last
   * half of the tokens has three quarters of the pairs of query and key.
   */
  tokens?: number;
  /** Bytes on the device; the rest lies on the host. Default: all. */
  deviceBytes?: number;
}

/** Layers, lengths and memory of a schedule. Everything is allocated when it is made. */
export interface LayerScheduleOptions {
  layers: readonly Layer[];
  /** Longest sequence. */
  tokens: number;
  /** Tokens per chunk. */
  chunk: number;
  /** Width of the residual stream. */
  width: number;
  /** Workspace of the layers; its stream is the compute stream. */
  ws: Workspace;
  /** A store to use (it stays yours) ... */
  store?: ActivationStore;
  /** ... or how to make one. Default: everything on the workspace's device. */
  storeOptions?: Omit<StoreOptions, 'layers' | 'tokens' | 'chunk' | 'width'>;
  /**
   * Keep what layers offer to keep from forward to backward (`Layer.keepBytes`; a decoder layer's attention output and log-sum-exp), so that backward does
   * not compute it again: the last `layers` of those that offer it (default all), of each the last `tokens` (default all), `deviceBytes` of it on the device (default
   * all), the rest on the host.
   * Default: nothing is kept.
   */
  keep?: KeepOptions;
  docStart?: Tensor | null;
  dropoutSeed?: number | undefined;
  /** Only `forwardOnly` will be called: two [tokens, width] buffers, no checkpoints. */
  evaluateOnly?: boolean;
  /** How many layer calls ahead host-tier chunks are asked for. Default 1; in backward, where nothing is written through the staging slots, one less than there are. */
  prefetchAhead?: number;
  /** Times phases and waits for copies by events on the compute stream; `LayerSchedule.profile` reads them. Default false. */
  profile?: boolean;
  /** For tests (CPU): recompute every layer in backward and compare with the forward, bit for bit. */
  verifyRecompute?: boolean;
}
