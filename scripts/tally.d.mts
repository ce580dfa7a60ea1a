export interface Tally {
  passed: number;
  failed: number;
  skipped: number;
}
export function tallyReport(name: string, file: string, exitCode: number): Tally & { problems: string[] };
export function summary(total: Tally): string;
