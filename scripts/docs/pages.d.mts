export const docs: string;
export const site: string;
export const packages: readonly string[];
export const examples: readonly string[];
export const pages: ReadonlyMap<string, string>;
export function pageText(source: string): string;
export function writePages(): void;
export function apiSidebar(): { text: string; link: string }[];
