// Dead links of a built site: every href to a page, a file or an anchor of it must be there. Other sites are only asked on demand.
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join, posix } from 'node:path';

const attributes = (html, name) => [...html.matchAll(new RegExp(`\\s${name}="([^"]*)"`, 'g'))].map(([, value]) => decode(value));
const decode = (text) => text.replaceAll('&amp;', '&').replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&quot;', '"');
const safely = (text) => {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a % that is none of an escape
  }
};

/** `{ problems, files, links, external }`; `external`: addresses, each with the first page that links to it. */
export function checkSite(folder) {
  const files = readdirSync(folder, { recursive: true }).filter((file) => file.endsWith('.html') && file !== '404.html');
  const contents = new Map(files.map((file) => [file, readFileSync(join(folder, file), 'utf8')]));
  const anchors = new Map([...contents].map(([file, html]) => [file, new Set(attributes(html, 'id'))]));
  const problems = [];
  const external = new Map();
  let links = 0;
  for (const [file, html] of contents) {
    for (const href of new Set([...attributes(html, 'href'), ...attributes(html, 'src')])) {
      if (/^(data|mailto):/.test(href) || href === '') continue;
      if (/^(https?:)?\/\//.test(href)) {
        if (!external.has(href)) external.set(href, file);
        continue;
      }
      links++;
      const [path, anchor] = href.split('#').map(safely);
      const at = path === '' ? file : posix.normalize(path.startsWith('/') ? path.slice(1) : posix.join(posix.dirname(file), path));
      const page = [at, `${at}.html`, posix.join(at, 'index.html')].find(
        (name) => existsSync(join(folder, name)) && statSync(join(folder, name)).isFile(),
      );
      if (!page) problems.push(`${file}: no page ${href}`);
      else if (anchor && !anchors.get(page)?.has(anchor)) problems.push(`${file}: no anchor ${href}`);
    }
  }
  return { problems, files: files.length, links, external };
}

/** What does not answer. A site that refuses programs (401, 403, 429) may be there all the same. */
export async function checkExternal(external) {
  const ask = async (url, method) => (await fetch(url, { method, redirect: 'follow', signal: AbortSignal.timeout(20_000) })).status;
  const results = await Promise.all(
    [...external].map(async ([url, file]) => {
      try {
        let status = await ask(url, 'HEAD');
        if (status >= 400) status = await ask(url, 'GET');
        return status < 400 || [401, 403, 429].includes(status) ? null : `${file}: ${url} answers ${status}`;
      } catch (error) {
        return `${file}: ${url} does not answer (${error.cause?.code ?? error.message})`;
      }
    }),
  );
  return results.filter(Boolean);
}
