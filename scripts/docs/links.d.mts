export interface SiteReport {
  problems: string[];
  files: number;
  links: number;
  external: Map<string, string>;
}
export function checkSite(folder: string): SiteReport;
export function checkExternal(external: ReadonlyMap<string, string>): Promise<string[]>;
