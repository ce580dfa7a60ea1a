/** Caps of a case, and a clean slate before it: what an earlier case took must not count as this one's. */
import { type DeviceLike, processMemory, setRamLimit, setVramLimit } from '@lc/tensor';
import { isOutOfMemory } from '../budgets.js';

/** On a GPU the allocator holds the caps (context and libraries count), and gives the driver back what it holds unused. On the CPU plans hold them. */
export function applyCaps(device: DeviceLike, { vram, ram }: { vram?: number | undefined; ram?: number | undefined }): void {
  if (!device.startsWith('cuda')) return;
  giveBackUnused(device);
  setVramLimit(device, vram ?? null);
  setRamLimit(ram ?? null);
}

/** A limit below what the pool holds makes it give back what is free in it; where that does not suffice the limit is refused, and the memory is back all the same. */
function giveBackUnused(device: DeviceLike): void {
  const { bytes, poolBytes, poolUsedBytes } = processMemory(device);
  try {
    setVramLimit(device, Math.max(1, bytes - (poolBytes - poolUsedBytes)));
  } catch (error) {
    if (!isOutOfMemory(error)) throw error;
  }
}
