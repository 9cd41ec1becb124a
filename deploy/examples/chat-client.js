/**
 * A client of chat-service, for browsers and Node 20.3 or later. Copy this file: it needs `fetch` and nothing else.
 *
 *     const chat = new ChatClient('https://chat.example.com/');
 *     await chat.login('ana', 'correct horse battery');
 *     const { position } = await chat.conversations();
 *     await chat.follow({ position, onMessage: (message) => console.log(message.content) });
 *
 * Every method that asks the service rejects with an {@link ApiError} when the service refuses, and with what `fetch`
 * rejects with (a `TypeError`) when there is no answer. Status 401 means that the session has ended: log in again. Until
 * then the tokens are renewed where they have to be.
 *
 * @typedef {{id: string, seq: number, sender_id: string, recipient_id: string, content: string, created_at: string, erased?: true}} Message
 *   `erased`: its sender was deleted, and its content is gone
 * @typedef {{peer: {id: string, username: string | null}, last_message: Message, last_seq: number}} Conversation
 *   a deleted user has no name
 * @typedef {{id?: string, access: string, refresh?: string, renewAt?: number, expiresAt?: number}} Tokens of a session, to
 *   keep where only this client can read them. `id` names the session among the tabs of a browser, and is never sent. Times
 *   in ms since 1970
 */

/** A refusal: the status and the problem's body (RFC 9457), whose `errors` name the fields of a 422. */
export class ApiError extends Error {
  /** @param {number} status @param {{detail?: string, errors?: {field: string, message: string}[]}} problem */
  constructor(status, problem, retryAfter = null, reason = null) {
    super(problem.detail ?? `the service answered ${status}`);
    this.status = status;
    this.errors = problem.errors ?? [];
    /** Seconds, where the service says when to come back (429, 503). */
    this.retryAfter = retryAfter;
    /** Why the session has ended, where it is known: `expired`, `revoked` (elsewhere) or `deleted` (the user). */
    this.reason = reason;
  }
}

/** No answer takes longer, in ms. */
const ANSWER_LIMIT = 15_000;

/** A stream shows a comment every 15 s. When it is silent for this long, in ms, its connection is dead. */
const SILENCE_LIMIT = 40_000;

/** Before a broken stream is opened again, in ms: doubled with each failure, and a random part of it is waited. */
const BACKOFF = { first: 1_000, most: 30_000 };

/** A stream that was open for this long, in ms, was no failure. */
const STABLE_AFTER = 20_000;

/** An access token is renewed so long before it expires, in ms, or for the last quarter of its life where that is shorter. */
const RENEW_BEFORE = 60_000;

/**
 * For 10 s the service answers a refresh token once more, because its answer may have been lost. So many attempts, of which
 * each has a limit in ms, begin in that time.
 */
const REFRESH = { attempts: 3, limit: 3_000, pause: 300 };

/** Another tab renews the tokens for no longer than this, in ms. */
const LOCK_LIMIT = 20_000;

/** After these `end`s the session is of no more use. */
const FINAL = { expired: 'the token has expired', revoked: 'the session has ended', deleted: 'the user was deleted' };

export class ChatClient {
  #signal;
  #silence;
  #store;
  #now;
  /** @type {Tokens | null} */
  #tokens = null;
  /** @type {Promise<void> | null} */
  #renewing = null;

  /**
   * @param {string} base where the service is, with a slash at the end
   * @param {object} [options]
   * @param {AbortSignal} [options.signal] when it aborts, so do all requests and streams
   * @param {number} [options.silence] a stream without a byte for so many ms is opened again
   * @param {{save(tokens: Tokens | null): unknown, load?(): Promise<Tokens | null>}} [options.store] `save` gets the tokens
   *   whenever they change; `load` is asked for newer ones before they are renewed. Both are for tabs that share a session
   * @param {() => number} [options.now] the time in ms since 1970
   */
  constructor(base, { signal, silence = SILENCE_LIMIT, store, now = Date.now } = {}) {
    this.base = base;
    this.#signal = signal;
    this.#silence = silence;
    this.#store = store;
    this.#now = now;
  }

  get tokens() {
    return this.#tokens;
  }

  /** To go on with a session: tokens that were kept. They are not saved again. */
  set tokens(tokens) {
    this.#tokens = tokens && { id: newKey(), ...tokens };
  }

  /** @returns {Promise<{id: string, username: string, email: string, created_at: string}>} */
  async register(username, email, password) {
    return (await this.#fetch('POST', 'register', { body: { username, email, password } })).json();
  }

  /** Begins a session, and keeps its tokens for what follows. */
  async login(username, password) {
    const asked = this.#now();
    const answer = await this.#fetch('POST', 'login', { body: { username, password } });
    this.#keep(newTokens(newKey(), asked, await answer.json()));
  }

  /**
   * Ends the session. Its tokens are forgotten in any case.
   * @returns {Promise<boolean>} false where the service could not be asked: there the session lasts until it is ended from
   *   elsewhere, or was not used for long
   */
  async logout() {
    try {
      // The request outlives the page.
      await this.#ask('POST', 'logout', { keepalive: true });
      return true;
    } catch (error) {
      return error instanceof ApiError && error.status === 401;
    } finally {
      this.#keep(null);
    }
  }

  async me() {
    return (await this.#ask('GET', 'me')).json();
  }

  /** @returns {Promise<{id: string, username: string}>} rejects with status 404 if there is nobody of this name */
  async findUser(username) {
    return (await this.#ask('GET', `users/${encodeURIComponent(username)}`)).json();
  }

  /**
   * The conversations, the one with the newest message first. `position` was taken before the list was read: a stream from
   * there misses nothing. `next` is what to pass for the page after it, `null` on the last one.
   * @returns {Promise<{conversations: Conversation[], position: string | null, next: string | null}>}
   */
  async conversations(page = 'conversations') {
    const answer = await this.#ask('GET', page);
    return {
      conversations: await answer.json(),
      position: answer.headers.get('stream-position'),
      next: nextPage(answer, page),
    };
  }

  /**
   * A page of a conversation, newest first: the newest, those `before` a seq, or those that follow directly `after` one.
   * @returns {Promise<{messages: Message[], more: boolean}>} `more`: there are others in this direction
   */
  async messages(peerId, { before, after, limit = 50 } = {}) {
    const query = new URLSearchParams({ peer_id: peerId, limit: String(limit) });
    if (before !== undefined) query.set('before', String(before));
    if (after !== undefined) query.set('after', String(after));
    const answer = await this.#ask('GET', `messages?${query}`);
    return { messages: await answer.json(), more: nextPage(answer, 'messages') !== null };
  }

  /**
   * Sends a message. Where there is no answer it may have been stored or not: send it again with the same `key`, and it is
   * stored once.
   * @returns {Promise<Message>}
   */
  async send(recipientId, content, key = newKey()) {
    const body = { recipient_id: recipientId, content };
    return (await this.#ask('POST', 'send', { body, headers: { 'idempotency-key': key } })).json();
  }

  /**
   * Follows the user's messages until `signal` aborts: each after `position` once, those of a conversation in the order of
   * `seq`, over any number of broken connections. The callbacks may be asynchronous, and the next event waits for them. An
   * event counts as seen once its callback has returned; after one that throws, the stream is opened again, and the event
   * comes once more.
   *
   * Rejects with an ApiError where it is of no use to come back: with 401 when the session has ended, with 204 when the
   * service says so. An access token that expires is no such case: it is renewed.
   *
   * @param {object} options
   * @param {string | null} [options.position] the last one seen; without it the stream begins now
   * @param {AbortSignal} [options.signal]
   * @param {(message: Message) => unknown} [options.onMessage]
   * @param {(erased: {peer_id: string, seq: number}) => unknown} [options.onErased] messages of this conversation lost their
   *   content, up to `seq`: reload it
   * @param {(reason: string) => unknown} [options.onReset] the position could not be taken up: reload conversations and
   *   messages, for the stream begins now
   * @param {(state: 'connecting' | 'open' | 'waiting', wait: number) => unknown} [options.onState] `wait` in ms
   * @param {(position: string) => unknown} [options.onPosition] to keep it over a restart
   * @param {(reason: string) => unknown} [options.onEnd] why the service has ended a stream, such as `draining`
   */
  async follow({ position = null, signal, onMessage, onErased, onReset, onState, onPosition, onEnd } = {}) {
    const stop = anyOf(signal, this.#signal);
    let failures = 0;
    while (!stop.aborted) {
      onState?.('connecting', 0);
      const [session, started] = [this.#tokens?.id, performance.now()];
      let retry = null;
      let end = null;
      try {
        for await (const event of this.#events(position, stop)) {
          if (event.retry !== undefined) retry = event.retry;
          if (event.name === 'message') await onMessage?.(JSON.parse(event.data));
          if (event.name === 'erased') await onErased?.(JSON.parse(event.data));
          if (event.name === 'reset') await onReset?.(JSON.parse(event.data).reason);
          if (event.name === 'ready' || event.name === 'reset') onState?.('open', 0);
          if (event.id && event.id !== position) {
            position = event.id;
            onPosition?.(position);
          }
          if (event.name === 'end') {
            end = JSON.parse(event.data).reason;
            break;
          }
        }
      } catch (error) {
        if (stop.aborted) return;
        if (error instanceof ApiError && !mayComeBack(error.status)) throw error;
        if (error instanceof ApiError && error.retryAfter !== null) retry = error.retryAfter * 1000;
      }
      if (stop.aborted) return;
      if (end !== null) onEnd?.(end);
      const goesOn = end === 'expired' && this.#tokens?.refresh;
      if (FINAL[end] && !goesOn && session === this.#tokens?.id) {
        this.#keep(null);
        throw new ApiError(401, { detail: FINAL[end] }, null, end);
      }
      if (performance.now() - started > STABLE_AFTER) failures = 0;
      // What the service asks for is random already.
      const wait = retry ?? Math.min(BACKOFF.most, BACKOFF.first * 2 ** failures) * Math.random();
      failures += 1;
      onState?.('waiting', wait);
      await sleep(wait, stop);
    }
  }

  /** The events of one connection. */
  async *#events(position, stop) {
    const silence = new AbortController();
    const abort = () => silence.abort();
    let timer = setTimeout(abort, ANSWER_LIMIT);
    globalThis.addEventListener?.('offline', abort);
    try {
      const headers = { accept: 'text/event-stream' };
      if (position) headers['last-event-id'] = position;
      const answer = await this.#ask('GET', 'stream', { headers, signal: anyOf(silence.signal, stop) });
      if (answer.status === 204) throw await refusal(answer);
      const decoder = new TextDecoder();
      const parser = new EventParser();
      const reader = answer.body.getReader();
      clearTimeout(timer);
      timer = setTimeout(abort, this.#silence);
      try {
        for (;;) {
          const { done, value } = await reader.read();
          if (done) return;
          // What a callback takes is no silence.
          clearTimeout(timer);
          yield* parser.push(decoder.decode(value, { stream: true }));
          timer = setTimeout(abort, this.#silence);
        }
      } finally {
        reader.cancel().catch(() => {});
      }
    } finally {
      clearTimeout(timer);
      globalThis.removeEventListener?.('offline', abort);
    }
  }

  /** A request with the access token. */
  async #ask(method, path, options = {}) {
    const tokens = await this.#freshTokens();
    try {
      return await this.#fetch(method, path, { ...options, token: tokens?.access });
    } catch (error) {
      if (error.status !== 401 || !tokens?.refresh) throw error;
    }
    await this.#renew(tokens);
    return this.#fetch(method, path, { ...options, token: this.#tokens?.access });
  }

  async #fetch(method, path, { body, headers = {}, token, limit = ANSWER_LIMIT, signal, keepalive = false } = {}) {
    const answer = await fetch(new URL(path, this.base), {
      method,
      headers: {
        ...headers,
        ...(token && { authorization: `Bearer ${token}` }),
        ...(body && { 'content-type': 'application/json' }),
      },
      body: body && JSON.stringify(body),
      cache: 'no-store',
      keepalive,
      // A stream has its own.
      signal: signal ?? anyOf(AbortSignal.timeout(limit), this.#signal),
    });
    if (!answer.ok) throw await refusal(answer);
    return answer;
  }

  #keep(tokens) {
    this.#tokens = tokens;
    this.#store?.save(tokens);
  }

  /** The tokens, renewed where they are about to expire. Where that fails, the old ones while they last. */
  async #freshTokens() {
    const tokens = this.#tokens;
    if (!tokens?.refresh || this.#now() < (tokens.renewAt ?? Infinity)) return tokens;
    try {
      await this.#renew(tokens);
    } catch (error) {
      if (error.status === 401 || this.#now() >= tokens.expiresAt) throw error;
    }
    return this.#tokens;
  }

  /** Exchanges these tokens for new ones, unless they were already. One exchange at a time: a token works once. */
  async #renew(tokens) {
    if (this.#tokens?.refresh !== tokens.refresh) return;
    this.#renewing ??= this.#alone(tokens, () => this.#exchange(tokens)).finally(() => {
      this.#renewing = null;
    });
    await this.#renewing;
  }

  /** While no other tab does the same. Browsers have no locks without HTTPS: two tabs then get the same answer. */
  async #alone(tokens, work) {
    const locks = globalThis.navigator?.locks;
    if (!locks) return work();
    const signal = anyOf(AbortSignal.timeout(LOCK_LIMIT), this.#signal);
    return locks.request(`chat-session-${tokens.id}`, { signal }, work);
  }

  async #exchange(tokens) {
    const newer = await this.#store?.load?.();
    if (newer?.id === tokens.id && newer.refresh !== tokens.refresh) this.#tokens = newer;
    if (this.#tokens?.refresh !== tokens.refresh) return;
    const asked = this.#now();
    for (let attempt = 1; ; attempt += 1) {
      try {
        const [body, limit] = [{ refresh_token: tokens.refresh }, REFRESH.limit];
        const answer = await (await this.#fetch('POST', 'refresh', { body, limit })).json();
        // Somebody may have logged out meanwhile.
        if (this.#tokens?.id === tokens.id) this.#keep(newTokens(tokens.id, asked, answer));
        return;
      } catch (error) {
        if (error.status === 401 && this.#tokens?.id === tokens.id) this.#keep(null);
        const isRefused = error instanceof ApiError && !mayComeBack(error.status);
        if (isRefused || attempt === REFRESH.attempts || this.#signal?.aborted) throw error;
      }
      await sleep(REFRESH.pause, this.#signal);
    }
  }
}

/** @returns {Tokens} */
function newTokens(id, asked, { access_token: access, refresh_token: refresh, expires_in: seconds }) {
  const expiresAt = asked + 1000 * seconds;
  return { id, access, refresh, expiresAt, renewAt: expiresAt - Math.min(RENEW_BEFORE, 250 * seconds) };
}

/**
 * Server-Sent Events, as the HTML standard reads them: https://html.spec.whatwg.org/multipage/server-sent-events.html.
 * Text may come in pieces of any size.
 */
export class EventParser {
  #rest = '';
  #data = [];
  #name = '';
  #id = '';
  #retry;
  #afterReturn = false;

  /**
   * The events that this text completes, each with the id and the delay in ms that were named last, with it or before.
   * @returns {{name: string, data: string, id: string, retry?: number}[]}
   */
  push(text) {
    if (this.#afterReturn && text.startsWith('\n')) text = text.slice(1);
    if (text !== '') this.#afterReturn = text.endsWith('\r');
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    return lines.flatMap((line) => this.#line(line));
  }

  #line(line) {
    if (line === '') {
      const event = { name: this.#name || 'message', data: this.#data.join('\n'), id: this.#id, retry: this.#retry };
      const hasData = this.#data.length > 0;
      this.#name = '';
      this.#data = [];
      return hasData ? [event] : [];
    }
    const colon = line.indexOf(':');
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '');
    if (field === 'data') this.#data.push(value);
    if (field === 'event') this.#name = value;
    if (field === 'id' && !value.includes('\0')) this.#id = value;
    if (field === 'retry' && /^\d+$/.test(value)) this.#retry = Number(value);
    return [];
  }
}

/** A key for a new message. */
export function newKey() {
  // Not randomUUID: browsers have it over HTTPS only.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** A signal that aborts with the first of those that are there. */
function anyOf(...signals) {
  return AbortSignal.any(signals.filter(Boolean));
}

function mayComeBack(status) {
  return status >= 500 || status === 408 || status === 429;
}

async function refusal(answer) {
  const retryAfter = Number.parseInt(answer.headers.get('retry-after') ?? '', 10);
  const problem = await answer.json().catch(() => ({}));
  return new ApiError(answer.status, problem, Number.isNaN(retryAfter) ? null : retryAfter);
}

/** The page's path, relative to the base, with the query of the Link to the next one. */
function nextPage(answer, page) {
  const query = /<[^>?]*(\?[^>]*)>;\s*rel="next"/.exec(answer.headers.get('link') ?? '');
  return query && page.split('?')[0] + query[1];
}

/** Ends early when the signal aborts, or when the browser is back online. */
function sleep(ms, signal) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', end);
      globalThis.removeEventListener?.('online', end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal?.addEventListener('abort', end);
    globalThis.addEventListener?.('online', end);
  });
}
