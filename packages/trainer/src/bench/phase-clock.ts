/** Device time by phase of a step: an event after every chunk's launches, read when it is done, so that nothing waits for it. */
import { Event, type Stream } from '@lc/tensor';

export class PhaseClock implements Disposable {
  readonly seconds: Record<string, number> = {};
  private readonly pending: { phase: string; event: Event }[] = [];
  private readonly idle: Event[] = [];
  private previous: Event | null = null;
  private wall = 0;

  constructor(
    private readonly stream: Stream,
    private readonly onGpu: boolean,
  ) {}

  start(): void {
    this.wall = performance.now();
    if (this.onGpu) this.previous = this.record();
  }

  /** What was launched since the last call belongs to `phase`. */
  mark(phase: string): void {
    if (!this.onGpu) {
      const now = performance.now();
      this.add(phase, now - this.wall);
      this.wall = now;
      return;
    }
    this.pending.push({ phase, event: this.record() });
    while (this.pending[0]?.event.query()) this.settle();
  }

  /** After the stream has been waited for. */
  finish(): void {
    while (this.pending.length > 0) this.settle();
  }

  dispose(): void {
    for (const event of [...this.idle, ...this.pending.map((p) => p.event), ...(this.previous ? [this.previous] : [])]) event.dispose();
    this.idle.length = this.pending.length = 0;
    this.previous = null;
  }
  [Symbol.dispose](): void {
    this.dispose();
  }

  private settle(): void {
    const next = this.pending.shift();
    if (!next || !this.previous) return;
    this.add(next.phase, next.event.elapsedSince(this.previous));
    this.idle.push(this.previous);
    this.previous = next.event;
  }
  private record(): Event {
    const event = this.idle.pop() ?? new Event(this.stream.device, { timing: true });
    event.record(this.stream);
    return event;
  }
  private add(phase: string, ms: number): void {
    this.seconds[phase] = (this.seconds[phase] ?? 0) + ms / 1000;
  }
}
