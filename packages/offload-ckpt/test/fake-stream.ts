/** Streams whose work runs later, in any order that the waits allow: a missing wait shows as a wrong result. */
import { copy, type Tensor } from '@lc/tensor';
import type { EventLike, StreamFactory, StreamLike } from '../src/index.js';

interface Point {
  done: boolean;
}
type Item = { run(): void } | { after: Point };

export class FakeEvent implements EventLike {
  point: Point | null = null;
  record(stream: StreamLike): void {
    const point = { done: false };
    this.point = point;
    (stream as FakeStream).enqueue(() => {
      point.done = true;
    });
  }
  async sync(): Promise<void> {
    throw new Error('not used');
  }
  dispose(): void {}
}

export class FakeStream implements StreamLike {
  queue: Item[] = [];
  constructor(
    readonly name: string,
    private readonly machine: FakeMachine,
  ) {}
  enqueue(run: () => void): void {
    this.queue.push({ run });
  }
  copy(dst: Tensor, src: Tensor): void {
    this.machine.copies++;
    this.enqueue(() => copy(dst, src));
  }
  wait(event: EventLike): void {
    const { point } = event as FakeEvent;
    if (point && !this.machine.ignoreWaitsOf.has(this.name)) this.queue.push({ after: point });
  }
  async sync(): Promise<void> {}
  dispose(): void {}
  /** Runs one item; false when there is none or it must wait. */
  step(): boolean {
    while (this.queue.length > 0) {
      const item = this.queue[0] as Item;
      if ('after' in item) {
        if (!item.after.done) return false;
        this.queue.shift();
        continue;
      }
      this.queue.shift();
      item.run();
      return true;
    }
    return false;
  }
}

export class FakeMachine implements StreamFactory {
  copies = 0;
  readonly streams: FakeStream[] = [];
  readonly compute: FakeStream;
  constructor(readonly ignoreWaitsOf: ReadonlySet<string> = new Set()) {
    this.compute = this.stream();
  }
  /** Made in this order: compute, in (host to device), out. */
  stream(): FakeStream {
    const stream = new FakeStream(['compute', 'in', 'out'][this.streams.length] ?? 'more', this);
    this.streams.push(stream);
    return stream;
  }
  event(): FakeEvent {
    return new FakeEvent();
  }
  /** Runs everything; `pick` orders the streams to try at each step. Throws on a deadlock. */
  drain(pick: (streams: readonly FakeStream[]) => FakeStream[]): void {
    while (this.streams.some((s) => s.queue.length > 0)) {
      const moved = pick(this.streams).some((s) => s.step());
      if (!moved && this.streams.some((s) => s.queue.some((item) => 'run' in item)))
        throw new Error('deadlock: streams wait for each other');
      if (!moved) return;
    }
  }
}
