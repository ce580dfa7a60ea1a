/** Reports tensors that were garbage-collected without `dispose()`. Only a detector: the native handle frees the memory as a last resort. */

interface Leak {
  label: string;
  nbytes: number;
}
const leaked: Leak[] = [];
let warned = false;

const registry = new FinalizationRegistry<Leak>((leak) => {
  leaked.push(leak);
  if (warned) return;
  warned = true;
  process.emitWarning(
    `a tensor '${leak.label}' of ${leak.nbytes} bytes was garbage-collected without dispose(); use 'using', a Scope or dispose(). Reported once; leaks() lists all`,
    { code: 'LC_LEAK' },
  );
});

export function trackLeak(token: object, label: string, nbytes: number): void {
  registry.register(token, { label, nbytes }, token);
}
export function untrackLeak(token: object): void {
  registry.unregister(token);
}

/** Tensors found so far that nobody disposed. */
export function leaks(): readonly Leak[] {
  return leaked;
}
