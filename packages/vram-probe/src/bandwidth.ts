import { type Device, defaultStream, Event, empty, isPinned, memInfo, Scope, type Tensor } from '@lc/tensor';

/** What copies between host and one device reach. */
export interface CopyBandwidth {
  device: Device;
  /** Whether the host side was pinned; if not, copies pass through the driver's own buffer and are slower. */
  pinned: boolean;
  toDevice: { bytesPerSecond: number };
  toHost: { bytesPerSecond: number };
}

const BYTES = 128 << 20;
const ROUNDS = 5;

/** Copies of 128 MiB between pinned host memory and a GPU, both ways, median of five; null where there is no room for it. */
export async function copyBandwidth(device: Device): Promise<CopyBandwidth | null> {
  if (memInfo(device).freeBytes < 2 * BYTES || memInfo('cpu').freeBytes < 4 * BYTES) return null;
  using scope = new Scope();
  const memory = (on: Device): Tensor => scope.own(empty([BYTES], { dtype: 'u8', device: on, label: 'copy bandwidth' }));
  const [host, there] = [memory('host'), memory(device)];
  const stream = defaultStream(device); // the one that the allocations are ordered on
  const [before, after] = [scope.own(new Event(device, { timing: true })), scope.own(new Event(device, { timing: true }))];
  const measure = async (dst: Tensor, src: Tensor): Promise<{ bytesPerSecond: number }> => {
    const times: number[] = [];
    for (let round = 0; round <= ROUNDS; round++) {
      before.record(stream);
      stream.copy(dst, src);
      after.record(stream);
      await after.sync();
      if (round > 0) times.push(after.elapsedSince(before)); // the first warms up
    }
    const median = times.sort((a, b) => a - b)[ROUNDS >> 1] as number;
    return { bytesPerSecond: BYTES / (median / 1e3) };
  };
  return { device, pinned: isPinned(host), toDevice: await measure(there, host), toHost: await measure(host, there) };
}
