/** What a plan may count on: limits, what is free, and how to go on from a plan whose memory was not there. */
import { type Device, deviceMemory, LcError, memInfo, processMemory, setRamLimit, setVramLimit } from '@lc/tensor';
import { type Plan, ramInfo } from '@lc/vram-probe';

/** Which budget ran out. */
export type Budget = 'VRAM' | 'RAM' | 'pinned';

/** Bytes that a plan may count on. */
export interface Budgets {
  vram: number;
  ram: number;
}

/** Bytes that may be taken; null: no limit, undefined: as it is. */
export interface Limits {
  vramLimit?: number | null | undefined;
  ramLimit?: number | null | undefined;
}

/** Sets the limits that were given. @throws ERR_LC_OUT_OF_MEMORY when more is taken already */
export function applyLimits(device: Device, { vramLimit, ramLimit }: Limits): void {
  if (ramLimit !== undefined) setRamLimit(ramLimit);
  if (vramLimit !== undefined && device.startsWith('cuda')) setVramLimit(device, vramLimit);
}

/** What may be taken now: measured, within the limits, less a margin for what others take meanwhile and for kernels that are loaded at their first launch. */
export function measureBudgets(device: Device, { vramLimit, ramLimit }: Limits = {}): Budgets {
  const live = deviceMemory('cpu').liveBytes + deviceMemory('host').liveBytes;
  const allowed = ramLimit ? Math.max(0, ramLimit - live) : Number.POSITIVE_INFINITY;
  const ram = Math.min(memInfo('cpu').freeBytes, ramInfo().availableBytes * 0.9, allowed);
  if (!device.startsWith('cuda')) return { vram: Math.min(ram, vramLimit ?? Number.POSITIVE_INFINITY), ram };
  let { freeBytes } = memInfo(device);
  if (vramLimit) {
    const { bytes, poolBytes, poolUsedBytes } = processMemory(device);
    freeBytes = Math.min(freeBytes, vramLimit - (bytes - poolBytes + poolUsedBytes));
  }
  return { vram: Math.max(0, freeBytes - Math.max(256 << 20, freeBytes * 0.01)), ram };
}

export const isOutOfMemory = (error: unknown): error is LcError => error instanceof LcError && error.code === 'ERR_LC_OUT_OF_MEMORY';

/**
 * The budgets to plan with next. What is free is measured again after every reservation that fails: another process may have taken it since. Where that still promises too
 * much, the next plan gets clearly less of what ran out than the failed one took: 4%, then 8%, ... at most half; and once that was too little for any plan, the middle
 * between the two, until they lie close together.
 */
export class BudgetSearch {
  readonly budgets: Budgets;
  private readonly keys: (keyof Budgets)[] = [];
  /** Of what ran out last: the least that a failed plan took, and the most that no plan fitted into. */
  private most = Number.POSITIVE_INFINITY;
  private floor = 0;

  /** @param measure what is free now */
  constructor(
    private readonly measure: () => Budgets,
    private readonly onGpu: boolean,
  ) {
    this.budgets = { ...measure() };
  }

  /** A reservation of this plan failed. */
  failed(p: Plan, what: Budget, attempts: number): void {
    const { device: onDevice, host } = p.predictedPeak;
    const keys: (keyof Budgets)[] = !this.onGpu ? ['vram', 'ram'] : what === 'VRAM' ? ['vram'] : ['ram'];
    if (keys.join() !== this.keys.join()) {
      this.floor = 0;
      this.keys.splice(0, 2, ...keys);
    }
    this.most = Math.min(!this.onGpu ? onDevice + host : what === 'VRAM' ? onDevice : host, ...keys.map((key) => this.budgets[key]));
    const share = Math.min(0.5, 0.04 * 2 ** (attempts - 1));
    this.next(this.floor > 0 ? (this.floor + this.most) / 2 : this.most - Math.max(1 << 20, share * this.most));
  }

  /** No plan fits into these budgets. Whether there are larger ones worth trying. */
  tooLittle(): boolean {
    if (this.keys.length === 0) return false;
    this.floor = Math.min(...this.keys.map((key) => this.budgets[key]));
    this.next((this.floor + this.most) / 2);
    return this.keys.every((key) => this.budgets[key] > this.floor + 0.02 * this.most);
  }

  /** What surely may be counted on, for an error's advice. */
  least(): Budgets {
    const now = this.measure();
    return { vram: Math.min(this.budgets.vram, now.vram), ram: Math.min(this.budgets.ram, now.ram) };
  }

  private next(bytes: number): void {
    const now = this.measure();
    for (const key of this.keys) this.budgets[key] = Math.max(0, Math.min(bytes, now[key]));
  }
}
