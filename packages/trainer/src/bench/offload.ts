/** `lc bench offload`: what the copy streams reach, alone and through the activation store's staging slots. */
import { ActivationStore, type StoredChunk } from '@lc/offload-ckpt';
import { type DeviceLike, defaultStream, empty, fill, isPinned, Scope, Stream, type Tensor } from '@lc/tensor';
import { noise } from './bandwidth.js';
import { median } from './clock.js';
import { fixed, newReport, type Report, type Row, text } from './report.js';

export interface OffloadOptions {
  /** Bytes moved each way. */
  bytes: number;
  chunk: number;
  width: number;
}

/** Median wall seconds of `work` and what it queued. */
async function seconds(work: () => void, sync: () => Promise<void>, rounds = 3): Promise<number> {
  const all: number[] = [];
  for (let i = 0; i < rounds; i++) {
    await sync();
    const from = performance.now();
    work();
    await sync();
    all.push((performance.now() - from) / 1000);
  }
  return median(all);
}

export async function benchOffload(device: DeviceLike, { bytes, chunk, width }: OffloadOptions): Promise<Report> {
  const report = newReport('offload', device);
  const rows: Row[] = [];
  using scope = new Scope();
  const dtype = device === 'cpu' ? 'f32' : 'bf16';
  const from = performance.now();
  const host = scope.own(empty([bytes], { dtype: 'u8', device: 'host', label: 'bench' }));
  const took = (performance.now() - from) / 1000;
  const pinned = isPinned(host);
  rows.push({
    what: pinned ? 'pinning host memory' : 'host memory (not pinned)',
    seconds: took,
    ...(pinned ? { gbPerSecond: bytes / took / 1e9 } : {}),
  });
  fill(host, 1);
  {
    using own = new Scope();
    const there = own.own(empty([bytes], { dtype: 'u8', device, label: 'bench' }));
    const back = own.own(empty([bytes], { dtype: 'u8', device, label: 'bench' }));
    const other = own.own(empty([bytes], { dtype: 'u8', device: 'host', label: 'bench' }));
    const [input, output] = [own.own(new Stream(device)), own.own(new Stream(device))];
    fill(back, 2);
    const sync = async (): Promise<void> => {
      await input.sync();
      await output.sync();
      await defaultStream(device).sync();
    };
    const reading = await seconds(() => input.copy(there, host), sync);
    const writing = await seconds(() => output.copy(other, back), sync);
    const both = await seconds(() => {
      input.copy(there, host);
      output.copy(other, back);
    }, sync);
    rows.push({ what: 'host to device', seconds: reading, gbPerSecond: bytes / reading / 1e9 });
    rows.push({ what: 'device to host', seconds: writing, gbPerSecond: bytes / writing / 1e9 });
    rows.push({ what: 'both at once', seconds: both, gbPerSecond: (2 * bytes) / both / 1e9 });
  }
  const peer = { read: rows[1]?.gbPerSecond as number, write: rows[2]?.gbPerSecond as number };
  const tokenBytes = width * (dtype === 'f32' ? 4 : 2);
  const chunks = 4;
  const layers = Math.max(1, Math.floor(bytes / (chunks * chunk * tokenBytes)));
  const store = scope.own(
    new ActivationStore({
      ...{ layers, tokens: chunks * chunk, chunk, width, dtype, device },
      deviceBytes: 0,
      dx: 'none',
      computeStream: defaultStream(device),
    }),
  );
  const source = noise(scope, device, [chunk, width], { dtype });
  const moved = layers * chunks * chunk * tokenBytes;
  const all = store.checkpoints.flat();
  const sync = (): Promise<void> => store.sync();
  const write = await seconds(() => {
    for (const entry of all) {
      store.compute.copy(store.write(entry), source);
      store.commit(entry);
    }
  }, sync);
  const target: Tensor = noise(scope, device, [chunk, width], { dtype });
  const read = await seconds(() => {
    const order = [...all].reverse();
    for (const [i, entry] of order.entries()) {
      store.prefetch(entry);
      const next: StoredChunk | undefined = order[i + 1];
      if (next) store.prefetch(next);
      store.compute.copy(target, store.read(entry));
      store.release(entry);
    }
  }, sync);
  rows.push({
    what: `store: ${all.length} chunks written and sent home`,
    seconds: write,
    gbPerSecond: moved / write / 1e9,
    ratio: moved / write / 1e9 / peer.write,
  });
  rows.push({
    what: 'store: the same chunks read back, one asked for ahead',
    seconds: read,
    gbPerSecond: moved / read / 1e9,
    ratio: moved / read / 1e9 / peer.read,
  });
  report.tables.push({
    title: `${(bytes / 2 ** 30).toFixed(2)} GiB; the store's chunks are ${chunk} x ${width} ${dtype}`,
    columns: [
      ['', text('what')],
      ['s', fixed('seconds', 4)],
      ['GB/s', fixed('gbPerSecond', 1)],
      ['of the bare copy', fixed('ratio', 2)],
    ],
    rows,
  });
  if (!pinned && device !== 'cpu') report.notes.push('The host memory could not be pinned: raise the limit of locked memory (ulimit -l).');
  return report;
}
