import { type Device, type DeviceLike, defaultStream, empty, LcError, LcTypeError, Scope, type Tensor } from '@lc/tensor';
import { chunkLength, planStore, type StorePlan, type StoreShape, type Tier } from './plan.js';
import type { Profiler } from './profile.js';
import { Slot, StoredChunk } from './slots.js';
import { type EventLike, type StreamFactory, type StreamLike, tensorStreams } from './streams.js';

/** A shape, the device, and streams to use. */
export interface StoreOptions extends StoreShape {
  /** Under which the allocator counts what is stored. Default 'checkpoints'. */
  label?: string;
  /** Where the layers run. Default 'cpu'. */
  device?: DeviceLike;
  /** The stream that layers run on. Default: the device's default stream. */
  computeStream?: StreamLike;
  /** Default: streams and events of `@lc/tensor`. */
  streams?: StreamFactory;
}

/**
 * Keeps layer inputs (gradient checkpoints), the gradient of one layer, and recomputed layer inputs, in chunks: the last checkpoints on the device,
 * the others in host memory. Everything is allocated by the constructor.
 *
 * The device reads and writes host-tier chunks through a ring of staging slots. Two copy streams move them while layers run; they touch nothing but
 * staging slots and host memory. Each slot has a `ready`, a `free` and a `stored` event, and every copy and every launch that follows waits for what
 * it depends on; the CPU waits for nothing. On the CPU device the tiers are plain memory, on the same code path.
 *
 * Use: `write` -> launch -> `commit`; `read` -> launch -> `release`; `update` (read, then overwrite in place) -> launch -> `commit`; `prefetch` whenever.
 */
export class ActivationStore implements Disposable {
  readonly plan: StorePlan;
  readonly device: Device;
  readonly compute: StreamLike;
  readonly layers: number;
  readonly tokens: number;
  readonly chunk: number;
  readonly width: number;
  /** [segment][chunk] */
  readonly checkpoints: StoredChunk[][] = [];
  /** [chunk] */
  readonly dx: StoredChunk[];
  /** [layer within the segment - 1][chunk] */
  readonly scratch: StoredChunk[][] = [];
  private readonly owner = new Scope();
  private readonly streams: StreamFactory;
  private readonly input: StreamLike | null = null;
  private readonly output: StreamLike | null = null;
  private readonly slots: Slot[] = [];
  /** @internal Times the compute stream's waits for copies. */
  profiler: Profiler | null = null;
  private clock = 0;
  private length: number;
  private closed = false;

  /** @throws LcTypeError ERR_LC_ARGUMENT; LcError ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY (nothing stays allocated) */
  constructor(options: StoreOptions) {
    this.plan = planStore(options);
    const { layers, tokens, chunk, width } = options;
    const { device = 'cpu', label = 'checkpoints' } = options;
    this.layers = layers;
    this.tokens = this.length = tokens;
    this.chunk = chunk;
    this.width = width;
    this.streams = options.streams ?? tensorStreams;
    this.compute = options.computeStream ?? defaultStream(device);
    this.device = device === 'cuda' ? 'cuda:0' : device;
    try {
      const whole = (tier: Tier): Tier[] => new Array<Tier>(this.plan.chunks).fill(tier);
      this.dx = options.dx === 'none' ? [] : this.makeRow('dx', 'dx', whole(options.dx ?? 'device'));
      const scratchRows = Math.min(this.plan.layersPerSegment, layers) - 1;
      for (let r = 0; r < scratchRows; r++)
        this.scratch.push(this.makeRow(`recomputed layer input ${r + 1}`, 'scratch', whole(options.scratch ?? 'device')));
      if (this.plan.stagingSlots > 0) {
        this.input = this.own(this.streams.stream(this.device));
        this.output = this.own(this.streams.stream(this.device));
        for (let i = 0; i < this.plan.stagingSlots; i++) {
          const tensor = this.owner.own(
            empty([Math.min(chunk, tokens), width], { dtype: this.plan.dtype, device: this.device, label: 'staging' }),
          );
          this.slots.push(new Slot(tensor, this.event(), this.event(), this.event()));
        }
      }
      // Last, and the last segments first, which lie on the device: where its memory is short that shows before host memory is pinned, which takes seconds.
      for (let s = this.plan.segments - 1; s >= 0; s--)
        this.checkpoints.unshift(this.makeRow(`${label} of segment ${s}`, label, this.plan.tiers[s] as Tier[]));
    } catch (error) {
      this.owner.dispose();
      throw error;
    }
  }

  /** Forgets all content and open leases, and sets the length of the sequence to come (at most `tokens`). */
  reset(tokens = this.tokens): void {
    if (!Number.isSafeInteger(tokens) || tokens < 1 || tokens > this.tokens) {
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `ActivationStore: the sequence has ${tokens} tokens, the store was made for 1 to ${this.tokens}; make a larger one`,
      );
    }
    for (const row of [...this.checkpoints, this.dx, ...this.scratch]) {
      for (const entry of row) {
        entry.valid = false;
        entry.slot = null;
        if (tokens !== this.length)
          entry.view = entry.home.rows(0, Math.min(chunkLength(tokens, this.chunk, entry.chunk), entry.home.shape[0] as number));
      }
    }
    this.length = tokens;
    for (const slot of this.slots) {
      if (slot.leased) this.markFree(slot); // a step that threw: whatever it launched on this slot comes before the next use
      slot.leased = slot.pending = false;
      slot.entry = null;
    }
  }

  /** A place of the chunk's shape for the compute stream to write; then `commit`. */
  write(entry: StoredChunk): Tensor {
    this.check('write', entry, false);
    entry.valid = false;
    if (entry.tier === 'device') return entry.view;
    const slot = entry.slot ?? this.acquire(null, `to write ${entry.name}`);
    if (slot === null) throw new LcError('ERR_LC_PLAN', 'ActivationStore: no staging slot');
    if (slot.leased) throw inUse('write', entry);
    this.bind(slot, entry);
    this.beforeComputeWrites(slot);
    slot.leased = true;
    return this.part(slot, entry);
  }

  /** The chunk, for the compute stream to read; then `release`. */
  read(entry: StoredChunk): Tensor {
    this.check('read', entry, true);
    if (entry.tier === 'device') return entry.view;
    const slot = entry.slot ?? this.load(entry, null);
    if (slot === null) throw new LcError('ERR_LC_PLAN', 'ActivationStore: no staging slot');
    if (slot.leased) throw inUse('read', entry);
    if (slot.loaded) this.computeWaits(slot.ready);
    slot.leased = true;
    slot.pending = false;
    return this.part(slot, entry);
  }

  /** The chunk, for the compute stream to read and overwrite; then `commit`. */
  update(entry: StoredChunk): Tensor {
    const tensor = this.read(entry);
    if (entry.slot && entry.tier === 'host') this.beforeComputeWrites(entry.slot);
    return tensor;
  }

  /** The launches that read the chunk have been queued. */
  release(entry: StoredChunk): void {
    if (entry.tier === 'device' || !entry.slot) return;
    this.markFree(entry.slot);
    entry.slot.leased = false;
  }

  /**
   * The launches that write the chunk have been queued: starts its way home. An earlier load from that home is over: whoever used what it loaded ran on
   * the compute stream, which waited for it; and what nobody used may be torn.
   */
  commit(entry: StoredChunk): void {
    entry.valid = true;
    const { slot } = entry;
    if (entry.tier === 'device' || !slot || !this.output) return;
    slot.ready.record(this.compute);
    slot.loaded = false;
    this.output.wait(slot.ready);
    this.output.copy(entry.view, this.part(slot, entry));
    slot.stored.record(this.output);
    slot.wasStored = true;
    slot.leased = false;
    slot.stamp = ++this.clock;
    entry.storedBy = slot;
  }

  /** Starts loading a host-tier chunk that will be read soon. Does nothing when it is there already, not written yet, or no slot is idle but those of what `stays`. */
  prefetch(entry: StoredChunk, stays?: ReadonlySet<StoredChunk>): void {
    if (entry.tier === 'host' && entry.valid && !entry.slot) this.load(entry, stays ?? new Set());
  }

  /** Resolves when all copies queued so far are done. Await it before `dispose()` if a step may be in flight on a GPU. */
  async sync(): Promise<void> {
    await this.input?.sync();
    await this.output?.sync();
    await this.compute.sync();
  }

  /** Gives all memory back. `await sync()` first where copies may be in flight. */
  dispose(): void {
    if (this.closed) return;
    this.closed = true;
    if (this.input && this.output) {
      for (const stream of [this.input, this.output]) {
        const done = this.event();
        done.record(stream);
        this.compute.wait(done); // frees are ordered on the compute stream
      }
    }
    this.owner.dispose();
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** @internal What made its streams and events. */
  get streamFactory(): StreamFactory {
    return this.streams;
  }

  /** @internal An event of the store's device; its maker disposes it. */
  makeEvent(options?: { timing?: boolean }): EventLike {
    return this.streams.event(this.device, options);
  }

  private own<T extends { dispose(): void }>(item: T): T {
    this.owner.own({ [Symbol.dispose]: () => item.dispose() });
    return item;
  }
  private event(): EventLike {
    return this.own(this.streams.event(this.device));
  }

  /** One allocation per tier; chunks are views of it. */
  private makeRow(name: string, label: string, tiers: readonly Tier[]): StoredChunk[] {
    const length = (c: number): number => chunkLength(this.tokens, this.chunk, c);
    const home = {} as Record<Tier, Tensor | undefined>;
    for (const tier of ['device', 'host'] as const) {
      const rows = tiers.reduce((sum, t, c) => sum + (t === tier ? length(c) : 0), 0);
      const device = tier === 'device' ? this.device : 'host';
      if (rows > 0) home[tier] = this.owner.own(empty([rows, this.width], { dtype: this.plan.dtype, device, label }));
    }
    const next = { device: 0, host: 0 };
    return tiers.map((tier, c) => {
      const view = (home[tier] as Tensor).rows(next[tier], length(c));
      next[tier] += length(c);
      return new StoredChunk(`${name}, chunk ${c}`, c, tier, view);
    });
  }

  private part(slot: Slot, entry: StoredChunk): Tensor {
    const rows = entry.view.shape[0] as number;
    return rows === slot.tensor.shape[0] ? slot.tensor : slot.tensor.rows(0, rows);
  }

  private check(what: string, entry: StoredChunk, needsContent: boolean): void {
    if (this.closed) throw new LcTypeError('ERR_LC_DISPOSED', `ActivationStore.${what}: the store was disposed`);
    if (needsContent && !entry.valid)
      throw new LcError(
        'ERR_LC_ARGUMENT',
        `ActivationStore.${what}: ${entry.name} was not written in this step; write and commit it first`,
      );
    if (entry.chunk * this.chunk >= this.length)
      throw new LcTypeError('ERR_LC_ARGUMENT', `ActivationStore.${what}: ${entry.name} lies behind the sequence's ${this.length} tokens`);
  }

  private bind(slot: Slot, entry: StoredChunk): void {
    if (slot.entry && slot.entry !== entry) slot.entry.slot = null;
    slot.entry = entry;
    entry.slot = slot;
    slot.pending = false;
  }

  private markFree(slot: Slot): void {
    slot.free.record(this.compute);
    slot.wasFreed = true;
    slot.stamp = ++this.clock;
  }

  /** Copies into or out of the slot that are still under way come first. */
  private beforeComputeWrites(slot: Slot): void {
    if (slot.loaded) this.computeWaits(slot.ready);
    if (slot.wasStored) this.computeWaits(slot.stored);
  }

  private computeWaits(event: EventLike): void {
    if (this.profiler) this.profiler.wait(event);
    else this.compute.wait(event);
  }

  /** `stays`: it is loaded ahead, and these do not give way; null: it is needed now. */
  private load(entry: StoredChunk, stays: ReadonlySet<StoredChunk> | null): Slot | null {
    const slot = this.acquire(stays, `to read ${entry.name}`);
    if (!slot || !this.input) return null;
    this.bind(slot, entry);
    if (slot.wasFreed) this.input.wait(slot.free);
    if (slot.wasStored) this.input.wait(slot.stored);
    if (entry.storedBy && entry.storedBy !== slot) this.input.wait(entry.storedBy.stored);
    this.input.copy(this.part(slot, entry), entry.view);
    slot.ready.record(this.input);
    slot.loaded = true;
    slot.pending = stays !== null;
    slot.stamp = ++this.clock;
    return slot;
  }

  /** The idle slot that has been idle longest; one that was loaded ahead only if it must be, and for another load ahead never, nor one of what `stays`. */
  private acquire(stays: ReadonlySet<StoredChunk> | null, why: string): Slot | null {
    let best: Slot | null = null;
    for (const slot of this.slots) {
      if (slot.leased || (stays && (slot.pending || (slot.entry && stays.has(slot.entry))))) continue;
      if (!best || (best.pending && !slot.pending) || (best.pending === slot.pending && slot.stamp < best.stamp)) best = slot;
    }
    if (!best && !stays) {
      throw new LcError(
        'ERR_LC_PLAN',
        `ActivationStore: all ${this.slots.length} staging slots are in use ${why}; raise stagingSlots, or release what was read`,
      );
    }
    if (best) best.pending = false;
    return best;
  }
}

const inUse = (what: string, entry: StoredChunk): LcError =>
  new LcError('ERR_LC_ARGUMENT', `ActivationStore.${what}: ${entry.name} is in use; release or commit it first`);
