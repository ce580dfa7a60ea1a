/** What the store keeps, and what it passes through. */
import type { Tensor } from '@lc/tensor';
import type { Tier } from './plan.js';
import type { EventLike } from './streams.js';

/** One chunk of one stored [tokens, width] array, in its home: the device or host memory. */
export class StoredChunk {
  /** The staging slot that holds the same bytes, if one does. */
  slot: Slot | null = null;
  /** The slot that last wrote this home; its event orders later loads. */
  storedBy: Slot | null = null;
  /** Written since the last `reset`. */
  valid = false;
  view: Tensor;
  constructor(
    readonly name: string,
    readonly chunk: number,
    readonly tier: Tier,
    readonly home: Tensor,
  ) {
    this.view = home;
  }
}

/** A device buffer of one chunk that host-tier data passes through. */
export class Slot {
  /** What it holds. */
  entry: StoredChunk | null = null;
  /** In use by the compute stream's next launches. */
  leased = false;
  /** Loaded ahead, not used yet. */
  pending = false;
  /** `ready` was recorded by the stream that reads from the host (else by the compute stream). */
  loaded = false;
  wasFreed = false;
  wasStored = false;
  stamp = 0;
  constructor(
    readonly tensor: Tensor,
    /** The content is complete. */
    readonly ready: EventLike,
    /** The compute stream has read it. */
    readonly free: EventLike,
    /** It has been written back to the host. */
    readonly stored: EventLike,
  ) {}
}
