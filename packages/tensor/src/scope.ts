/**
 * Owns disposables and disposes them in reverse order: `using scope = new Scope()`. An explicit object, never ambient, so it is safe across `await`.
 */
export class Scope implements Disposable {
  private items: Disposable[] = [];

  /** Takes ownership and returns its argument. */
  own<T extends Disposable>(item: T): T {
    this.items.push(item);
    return item;
  }

  /** Gives up ownership, e.g. of a result to return. */
  move<T extends Disposable>(item: T): T {
    const at = this.items.lastIndexOf(item);
    if (at >= 0) this.items.splice(at, 1);
    return item;
  }

  /** Disposes everything owned, also when one of them throws; the first error is rethrown at the end. */
  dispose(): void {
    const items = this.items;
    this.items = [];
    let failed = false;
    let error: unknown;
    for (const item of items.reverse()) {
      try {
        item[Symbol.dispose]();
      } catch (e) {
        if (!failed) error = e;
        failed = true;
      }
    }
    if (failed) throw error;
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}
