/** Two ways to run a pass that yields after every chunk: straight through, or giving the event loop its turns. */
import { setImmediate as nextTurn } from 'node:timers/promises';
import { LcError } from '@lc/tensor';
import type { ActivationStore } from './store.js';
import type { EventLike } from './streams.js';
import type { OpKind } from './sweeps.js';

/** After each layer call on a chunk. */
export interface Progress {
  /** 'input', 'forward', 'loss', 'recompute', 'fill', 'backward', 'hidden' (evaluation), 'verify' (tests). */
  phase: OpKind;
  /** -1 where no layer runs (input, loss, hidden). */
  layer: number;
  chunk: number;
  /** Calls done and in all, of this pass. */
  done: number;
  total: number;
}

/** Progress and cancellation of a pass. */
export interface RunOptions {
  /** Told after every chunk; must not throw. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Looked at after every chunk. */
  signal?: AbortSignal | undefined;
}

function stopIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted)
    throw new LcError('ERR_LC_ABORTED', 'LayerSchedule: aborted between chunks; start again with forward', { cause: signal.reason });
}

export function drain(steps: Iterable<Progress>, options: RunOptions = {}): void {
  stopIfAborted(options.signal);
  for (const progress of steps) {
    options.onProgress?.(progress);
    stopIfAborted(options.signal);
  }
}

/** Keeps at most two chunks queued ahead of the device. */
export class Pacer implements Disposable {
  private readonly events: EventLike[];
  private count = 0;

  constructor(private readonly store: ActivationStore) {
    this.events = [store.makeEvent(), store.makeEvent()];
  }

  async run(steps: Iterable<Progress>, options: RunOptions = {}): Promise<void> {
    stopIfAborted(options.signal);
    for (const progress of steps) {
      options.onProgress?.(progress);
      const event = this.events[this.count % 2] as EventLike;
      if (this.count >= 2) await event.sync(); // recorded two chunks ago
      event.record(this.store.compute);
      this.count++;
      await nextTurn();
      stopIfAborted(options.signal);
    }
  }

  dispose(): void {
    for (const event of this.events) event.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
