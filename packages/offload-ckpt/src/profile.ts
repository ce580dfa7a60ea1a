/** Where a step's device time goes: events on the compute stream at the boundaries of phases, and around every wait for a copy. */
import type { EventLike, StreamLike } from './streams.js';
import type { OpKind } from './sweeps.js';

/** 'open': preparing a layer (dequantization, zeroing dK and dV); else the kind of layer call. */
export type ProfilePhase = OpKind | 'open';

/** Time of one phase, by events on the compute stream. */
export interface PhaseTime {
  /** Milliseconds of device time, waits included. */
  ms: number;
  /** Milliseconds that the compute stream stood still for copies: what computation did not hide. */
  waitMs: number;
}

/** Times by phase; phases that did not run are absent. */
export type ScheduleProfile = Partial<Record<ProfilePhase, PhaseTime>>;

/** Makes events that keep the time. */
export type TimedEvents = () => EventLike;

interface Mark {
  phase: ProfilePhase | null;
  event: EventLike;
}
interface Wait {
  phase: ProfilePhase | null;
  before: EventLike;
  after: EventLike;
}

export class Profiler implements Disposable {
  private readonly marks: Mark[] = [];
  private readonly waits: Wait[] = [];
  private readonly spare: EventLike[] = [];
  private phase: ProfilePhase | null = null;

  constructor(
    private readonly compute: StreamLike,
    private readonly make: TimedEvents,
  ) {}

  /** What the compute stream is given from here on; null: nothing of ours. */
  enter(phase: ProfilePhase | null): void {
    if (phase === this.phase) return;
    this.phase = phase;
    this.marks.push({ phase, event: this.record() });
  }

  /** The compute stream's wait for `event`. */
  wait(event: EventLike): void {
    const before = this.record();
    this.compute.wait(event);
    this.waits.push({ phase: this.phase, before, after: this.record() });
  }

  /** Forgets what was recorded. */
  clear(): void {
    this.spare.push(...this.marks.map(({ event }) => event), ...this.waits.flatMap(({ before, after }) => [before, after]));
    this.marks.length = this.waits.length = 0;
    this.phase = null;
  }

  /** Waits for everything recorded, adds it up by phase, and starts anew. */
  async read(): Promise<ScheduleProfile> {
    const found: ScheduleProfile = {};
    const of = (phase: ProfilePhase): PhaseTime => {
      const time = found[phase] ?? { ms: 0, waitMs: 0 };
      found[phase] = time;
      return time;
    };
    this.enter(null);
    await this.marks.at(-1)?.event.sync();
    for (const [i, { phase, event }] of this.marks.entries()) {
      const next = this.marks[i + 1];
      if (phase && next) of(phase).ms += elapsed(next.event, event);
    }
    for (const { phase, before, after } of this.waits) if (phase) of(phase).waitMs += elapsed(after, before);
    this.clear();
    return found;
  }

  dispose(): void {
    this.clear();
    for (const event of this.spare.splice(0)) event.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }

  private record(): EventLike {
    const event = this.spare.pop() ?? this.make();
    event.record(this.compute);
    return event;
  }
}

const elapsed = (event: EventLike, earlier: EventLike): number => event.elapsedSince?.(earlier) ?? 0;
