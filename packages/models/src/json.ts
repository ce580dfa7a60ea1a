/** Reads fields of a config.json, gathering every problem instead of stopping at the first. */
export class FieldReader {
  readonly problems: string[] = [];
  constructor(readonly json: Readonly<Record<string, unknown>>) {}

  private fail<T>(key: string, expected: string, fallback: T): T {
    const value = this.json[key];
    this.problems.push(`${key}: expected ${expected}, got ${value === undefined ? 'nothing' : JSON.stringify(value)}`);
    return fallback;
  }
  private absent(key: string): boolean {
    return this.json[key] === undefined || this.json[key] === null;
  }

  /** A whole number from `min` to `max` (a config is not trusted: sizes are bounded before anything is made from them); `fallback` where the field is absent or null (required without one). */
  int(key: string, fallback?: number, min = 1, max = 2 ** 31 - 1): number {
    if (this.absent(key)) return fallback ?? this.fail(key, 'a whole number', min);
    const value = this.json[key];
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < min || value > max)
      return this.fail(key, `a whole number from ${min} to ${max}`, fallback ?? min);
    return value;
  }
  /** As `int`, under the first of several spellings that is present. */
  intOf(keys: readonly [string, ...string[]], fallback?: number): number {
    return this.int(keys.find((key) => !this.absent(key)) ?? keys[0], fallback);
  }
  intOrNull(key: string, fallback: number | null): number | null {
    return key in this.json && this.json[key] === null ? null : this.absent(key) ? fallback : this.int(key);
  }
  positive(key: string, fallback: number): number {
    if (this.absent(key)) return fallback;
    const value = this.json[key];
    return typeof value === 'number' && Number.isFinite(value) && value > 0 ? value : this.fail(key, 'a number above 0', fallback);
  }
  bool(key: string, fallback: boolean): boolean {
    if (this.absent(key)) return fallback;
    const value = this.json[key];
    return typeof value === 'boolean' ? value : this.fail(key, 'true or false', fallback);
  }
  /** The field, if present, must be one of `values`: anything else would be another model. */
  only(key: string, values: readonly unknown[]): void {
    if (!this.absent(key) && !values.includes(this.json[key]))
      this.fail(key, values.map((value) => JSON.stringify(value)).join(' or '), null);
  }
  /** A token id, a list of them, or null. */
  ids(key: string): readonly number[] {
    const value = this.json[key];
    if (value === undefined || value === null) return [];
    const list: unknown[] = Array.isArray(value) ? value : [value];
    return list.every((id): id is number => typeof id === 'number' && Number.isSafeInteger(id) && id >= 0)
      ? list
      : this.fail(key, 'token ids', []);
  }
  ints(key: string): readonly number[] {
    return this.ids(key);
  }
  strings(key: string): readonly string[] | null {
    const value = this.json[key];
    if (value === undefined || value === null) return null;
    return Array.isArray(value) && value.every((item): item is string => typeof item === 'string')
      ? value
      : this.fail(key, 'a list of strings', null);
  }
  object(key: string): Readonly<Record<string, unknown>> | null {
    const value = this.json[key];
    if (value === undefined || value === null) return null;
    return typeof value === 'object' && !Array.isArray(value) ? (value as Record<string, unknown>) : this.fail(key, 'an object', null);
  }
}
