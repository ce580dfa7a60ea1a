/**
 * The memory that steps run in, kept from step to step: planned again when the sequence, the limits or free memory change. Free memory alone has to change by more than 10% and
 * by more than 1 GiB, and then moves checkpoints and kept outputs only: chunk, tile and loss chunk decide the bits of the results, and stay.
 */
import type { TrainingSession } from '@lc/models';
import type { Plan } from '@lc/vram-probe';
import { applyLimits, type Budgets, isOutOfMemory, type Limits } from './budgets.js';
import { budgetsOf, planStep, type Reservation, type ReserveOptions, reserveStep } from './reserve.js';

const LEAST_MOVE = 2 ** 30;
const LEAST_SHARE = 0.1;

/** What free memory decides when sizes are fixed. */
const placed = (p: Plan): number[] => [p.checkpoints.deviceBytes, p.keep.deviceBytes, p.keep.deviceBytes + p.keep.hostBytes];

/** What a plan takes of the two budgets. */
function heldBy(p: Plan, onGpu: boolean): Budgets {
  const device = p.predictedPeak.device - p.bytes.context;
  const { host } = p.predictedPeak;
  return onGpu ? { vram: device, ram: host } : { vram: device + host, ram: device + host };
}

/** Plan, workspace and session of a loop of steps: kept while they fit, made again when sequence, limits or free memory change. */
export class StepMemory implements Disposable {
  private held: Reservation;
  /** Free memory beside the reservation, when it was made or last looked at for good. */
  private seen: Budgets;
  private limits: Limits | null = null;
  private o: ReserveOptions;

  /**
   * @param leastMove bytes that a change has to move
   * @throws as `reserveStep`
   */
  constructor(
    options: ReserveOptions,
    private readonly leastMove = LEAST_MOVE,
  ) {
    this.o = { ...options };
    this.held = reserveStep(this.o);
    this.seen = budgetsOf(this.o);
  }

  /** The plan that is in force. */
  get plan(): Plan {
    return this.held.plan;
  }
  /** What steps run with; another one after a change of plan. */
  get session(): TrainingSession {
    return this.held.session;
  }
  /** Plans that did not find their memory, of the latest reservation. */
  get attempts(): Reservation['attempts'] {
    return this.held.attempts;
  }

  /** New limits, from the next `prepare` on; null lifts one. */
  setLimits(limits: Limits): void {
    this.limits = { ...this.limits, ...limits };
  }

  /**
   * Before a step, when nothing is in flight: makes the plan again where it has to be, or where that gains much.
   * @param tokens length of the longest sequence to come
   * @returns why it was made again, or null: the old one stays
   * @throws as `reserveStep`; then nothing is reserved
   */
  async prepare(tokens: number): Promise<string | null> {
    const longer = tokens > this.plan.tokens;
    if (longer) this.o.tokens = tokens;
    if (this.limits) return this.withLimits(this.limits, longer);
    if (longer) return this.again(this.o, `a sequence of ${tokens} tokens`);
    const now = budgetsOf(this.o);
    if (!this.apart(now.vram, this.seen.vram) && !this.apart(now.ram, this.seen.ram)) return null;
    this.seen = now;
    const better = this.moved(now);
    return better ? this.again({ ...this.o, ...better }, 'free memory changed') : null;
  }

  /** Gives the memory back. */
  dispose(): void {
    this.held.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Worth the trouble: whether two amounts of bytes differ by more than a tenth of the larger and by more than 1 GiB. */
  private apart(a: number, b: number): boolean {
    return Math.abs(a - b) > Math.max(this.leastMove, LEAST_SHARE * Math.max(a, b));
  }

  private async withLimits(limits: Limits, longer: boolean): Promise<string | null> {
    this.limits = null;
    const before: Limits = { vramLimit: this.o.vramLimit, ramLimit: this.o.ramLimit };
    Object.assign(this.o, limits);
    if (!longer) {
      try {
        applyLimits(this.o.model.device, this.o);
        const now = budgetsOf(this.o);
        const fits = now.vram > 0 && now.ram > 0;
        if (fits && !this.apart(now.vram, this.seen.vram) && !this.apart(now.ram, this.seen.ram)) return null;
        if (fits && !this.moved(now)) {
          this.seen = now;
          return null;
        }
      } catch (error) {
        // More is taken than the new limit allows: what we hold has to go first.
        if (!isOutOfMemory(error)) throw error;
      }
    }
    const told = (name: keyof Limits): string =>
      this.o[name] === before[name] ? '' : `${name} ${before[name] ?? 'none'} -> ${this.o[name] ?? 'none'}`;
    return this.again(this.o, [told('vramLimit'), told('ramLimit')].filter(Boolean).join(', ') || 'limits set again');
  }

  /** The sizes of now with what is free placed anew, where that moves much; else null. */
  private moved(free: Budgets): Partial<ReserveOptions> | null {
    const { plan: p } = this;
    const mine = heldBy(p, this.o.model.device.startsWith('cuda'));
    const sizes = { chunk: p.chunk, tile: p.tile, lossChunk: p.lossChunk, layersPerSegment: p.segment };
    const next = planStep({ ...this.o, ...sizes, tokens: p.tokens, budgets: { vram: free.vram + mine.vram, ram: free.ram + mine.ram } });
    const [a, b] = [placed(p), placed(next)];
    return next.fits && a.some((bytes, i) => this.apart(bytes, b[i] as number)) ? sizes : null;
  }

  private async again(o: ReserveOptions, why: string): Promise<string> {
    await this.session.schedule.store.sync();
    this.held.dispose();
    this.held = reserveStep(o);
    this.seen = budgetsOf(this.o);
    return why;
  }
}
