/** Time on the device, by events; on the CPU, where a launch is complete when it returns, by the wall clock. */
import { type DeviceLike, defaultStream, Event } from '@lc/tensor';

export interface TimeOptions {
  /** Launches between two readings. Default 1. */
  times?: number;
  /** Readings of which the median is taken. Default 7. */
  rounds?: number;
  /** Launches before the first reading. Default 1. */
  warm?: number;
  /** No further round after so many milliseconds. Default 1500. */
  budget?: number;
}

export class Clock implements Disposable {
  private readonly start: Event;
  private readonly end: Event;

  constructor(private readonly device: DeviceLike) {
    this.start = new Event(device, { timing: true });
    this.end = new Event(device, { timing: true });
  }

  /** Median milliseconds of one `launch`. */
  async time(launch: () => void, options: TimeOptions = {}): Promise<number> {
    const { times = 1, rounds = 7, warm = 1, budget = 1500 } = options;
    for (let i = 0; i < warm; i++) launch();
    const all: number[] = [];
    for (let round = 0, spent = 0; round < rounds && (round === 0 || spent < budget); round++) {
      const ms = await this.once(launch, times);
      all.push(ms / times);
      spent += ms;
    }
    return median(all);
  }

  private async once(launch: () => void, times: number): Promise<number> {
    const stream = defaultStream(this.device);
    const from = performance.now();
    this.start.record(stream);
    for (let i = 0; i < times; i++) launch();
    this.end.record(stream);
    await this.end.sync();
    return this.device === 'cpu' ? performance.now() - from : this.end.elapsedSince(this.start);
  }

  dispose(): void {
    this.start.dispose();
    this.end.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? (sorted[middle] as number) : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}
