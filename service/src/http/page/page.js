// The chat page: what it knows, and how it shows it. Text from the service becomes text nodes only.

import { ApiError, ChatClient, newKey } from './chat-client.js';

const BASE = new URL('.', document.baseURI).href;
const part = (id) => document.getElementById(id);

// For this tab alone, and gone with it: tokens in localStorage would outlive the browser, on machines that are shared. A cookie
// that no script reads would need a service that believes cookies, and so a defence against requests of other sites. What a
// script could do with the tokens, the policy of http/page.rs prevents: no script runs but this one.
const TOKENS = 'chat-tokens';
const UNSENT = 'chat-unsent';

/** The service counts characters as Unicode does. */
const CONTENT_MAX = 4000;

/** The service knows an Idempotency-Key for 24 hours. */
const KEY_LIMIT_MS = 23 * 60 * 60 * 1000;

/** How long other tabs get to answer, in ms. */
const TABS_LIMIT = 150;

/** Ends the stream and all requests of a session. What one user has asked for must never reach the next. */
let leaving = null;
/** @type {ChatClient} */
let chat = null;
/** The user who has logged in; null at the entrance. */
let me = null;
/** Conversations by the peer's id: `{peer, last, lastSeq}`. */
let conversations = new Map();
let isListed = false;
let nextConversations = null;
/** The open conversation: `{peer, messages by seq, isLoaded, hasFailed, hasEarlier}`; null without one. */
let open = null;
/** What is written and not sent, by the peer's id. */
let drafts = new Map();
/** Messages without an answer: `{peer, content, key, at, fault}`. */
let unsent = [];
/** One after the other, so that they are stored in the order in which they were written. */
let sending = Promise.resolve();
/** Of the stream, as the module names it. */
let state = '';
let stateTimer = null;
let wasConnected = false;

function beginSession() {
  leaving?.abort();
  leaving = new AbortController();
  chat = new ChatClient(BASE, { signal: leaving.signal, store });
  me = null;
  open = null;
  conversations = new Map();
  isListed = false;
  nextConversations = null;
  drafts = new Map();
  unsent = [];
  sending = Promise.resolve();
  clearTimeout(stateTimer);
  stateTimer = null;
  wasConnected = false;
  delete part('connection').dataset.state;
  part('connection').textContent = '';
}

// ---- Tokens

// A tab that was duplicated shares its session. A refresh token works once, so the tabs tell one another of the next one. One
// that was asleep meanwhile asks.
const tabs = new BroadcastChannel('chat-tokens');

const store = {
  save(tokens) {
    if (!tokens) return sessionStorage.removeItem(TOKENS);
    sessionStorage.setItem(TOKENS, JSON.stringify(tokens));
    tabs.postMessage({ tokens });
  },
  async load() {
    tabs.postMessage({ wanted: chat.tokens?.id });
    await new Promise((go) => setTimeout(go, TABS_LIMIT));
    return chat.tokens;
  },
};

tabs.addEventListener('message', ({ data: { wanted, tokens } }) => {
  const mine = chat.tokens;
  if (!mine?.refresh) return;
  if (wanted === mine.id) tabs.postMessage({ tokens: mine });
  if (tokens?.id !== mine.id || tokens.expiresAt <= mine.expiresAt) return;
  chat.tokens = tokens;
  sessionStorage.setItem(TOKENS, JSON.stringify(tokens));
});

// ---- What was seen

// The seq up to which each conversation was seen, for the counts of what is new. This browser's own.
const seenKey = () => `chat-seen-${me.id}`;
let seen = {};

function loadSeen() {
  try {
    seen = JSON.parse(localStorage.getItem(seenKey())) ?? {};
  } catch {
    seen = {};
  }
}

function markSeen(peerId, seq) {
  if ((seen[peerId] ?? 0) >= seq) return;
  // Another tab may have written since.
  const before = seen;
  loadSeen();
  seen = { ...before, ...seen, [peerId]: seq };
  try {
    localStorage.setItem(seenKey(), JSON.stringify(seen));
  } catch {
    // Without storage the counts last as long as the page.
  }
}

addEventListener('storage', (event) => {
  if (!me || event.key !== seenKey()) return;
  loadSeen();
  showConversations();
});

// What came while nobody looked counts as seen now.
document.addEventListener('visibilitychange', () => me && showConversations());

// ---- The entrance

const purpose = () => new FormData(part('entrance-form')).get('purpose');

function showEntrance(notice) {
  beginSession();
  sessionStorage.removeItem(TOKENS);
  part('chat').hidden = true;
  part('entrance').hidden = false;
  part('entrance-form').hidden = false;
  part('messages').replaceChildren();
  part('conversations').replaceChildren();
  part('announcer').textContent = '';
  part('password').value = '';
  part('content').value = '';
  document.title = 'Chat';
  show('entrance-notice', notice);
  part(part('username').value ? 'password' : 'username').focus();
}

function show(id, notice) {
  part(id).textContent = notice ?? '';
  part(id).hidden = !notice;
}

function showFaults(error) {
  for (const field of ['username', 'email', 'password']) {
    const fault = error?.errors?.find((one) => one.field === field);
    part(`${field}-fault`).textContent = fault?.message ?? '';
    part(field).setAttribute('aria-invalid', String(fault !== undefined));
  }
  show('entrance-notice', error && !error.errors?.length ? words(error) : null);
  document.querySelector('#entrance [aria-invalid=true]')?.focus();
}

part('entrance-form').addEventListener('change', showPurpose);

function showPurpose() {
  const registers = purpose() === 'register';
  part('email-part').hidden = !registers;
  part('enter').textContent = registers ? 'Register' : 'Log in';
  part('password').autocomplete = registers ? 'new-password' : 'current-password';
}

part('entrance-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const [username, email, password] = ['username', 'email', 'password'].map((id) => part(id).value);
  part('enter').disabled = true;
  try {
    showFaults(null);
    if (purpose() === 'register') {
      await chat.register(username, email, password);
      // If only the login fails, there is nothing left to register.
      document.querySelector('input[value=login]').checked = true;
      showPurpose();
    }
    await chat.login(username, password);
    await enter();
  } catch (error) {
    showFaults(error);
  } finally {
    part('enter').disabled = false;
  }
});

part('log-out').addEventListener('click', async () => {
  // Nothing ends this request: not the end of the session here, which comes first.
  const last = new ChatClient(BASE);
  last.tokens = chat.tokens;
  sessionStorage.removeItem(UNSENT);
  part('entrance-form').reset();
  showPurpose();
  showEntrance();
  const here = chat;
  if (!(await last.logout()) && chat === here && !me) {
    show('entrance-notice', 'You are logged out here, but the service could not be reached: there your session has not ended.');
  }
});

/** What a person can do about it. */
function words(error) {
  if (!(error instanceof ApiError)) return 'The service cannot be reached.';
  const fields = error.errors.map((fault) => `${fault.field} ${fault.message}`).join('; ');
  return fields || error.message;
}

/** Why one has to log in again. */
function farewell(error) {
  if (error.reason === 'deleted') return 'This account was deleted.';
  if (error.reason === 'revoked') return 'You were logged out: here, on another device, or by a new password. Log in again.';
  return 'Your session has ended. Log in again.';
}

/** Shows an error; where the session has ended, the entrance. */
function fail(error) {
  // What was under way when the session ended.
  if (error.name === 'AbortError') return;
  if (error instanceof ApiError && error.status === 401) showEntrance(farewell(error));
  else show('notice', words(error));
}

// ---- The stream

async function enter() {
  me = await chat.me();
  loadSeen();
  const position = await loadConversations();
  part('me').textContent = me.username;
  part('entrance').hidden = true;
  part('chat').hidden = false;
  showConversation(null);
  part('find').focus();
  follow(position);
  restoreUnsent();
}

async function follow(position) {
  try {
    await chat.follow({ position, onMessage: arrived, onErased: erased, onReset: reload, onState: noteState });
  } catch (error) {
    fail(error);
  }
}

/** A stream ends now and then, and is back within a moment: that is no news, least of all for a screen reader. */
function noteState(now) {
  state = now;
  if (now !== 'open' && part('connection').dataset.state === 'open') stateTimer ??= setTimeout(showState, 1500);
  else showState();
  if (now === 'open' && open && !open.isLoaded) loadNewest(open);
}

function showState() {
  clearTimeout(stateTimer);
  stateTimer = null;
  wasConnected ||= state === 'open';
  const text = wasConnected ? 'Reconnecting…' : 'Connecting…';
  part('connection').dataset.state = state;
  part('connection').textContent = state === 'open' ? 'Connected' : text;
}

const peerOf = (message) => (message.sender_id === me.id ? message.recipient_id : message.sender_id);

/** Whether somebody looks at this conversation now. */
const isLookedAt = (peerId) => open?.peer.id === peerId && !document.hidden;

async function arrived(message) {
  const peerId = peerOf(message);
  const isNews = message.seq > (conversations.get(peerId)?.lastSeq ?? 0);
  // The stream has ids, and the list has names.
  if (!conversations.has(peerId)) await loadConversations();
  const conversation = conversations.get(peerId);
  if (conversation && message.seq > conversation.lastSeq) {
    Object.assign(conversation, { last: message, lastSeq: message.seq });
  }
  // Who answers, perhaps on another device, has read.
  if (message.sender_id === me.id) markSeen(peerId, message.seq);
  else if (isNews && conversation) announce(conversation.peer, message);
  if (open?.peer.id === peerId) {
    if (open.isLoaded && message.seq > newest(open) + 1) await loadNewer(open);
    if (open?.peer.id === peerId) addMessage(message);
    showMessages();
  }
  showConversations();
}

/** A deleted user's messages have lost their content, and the user the name. */
async function erased({ peer_id: peerId }) {
  await loadConversations();
  if (open?.peer.id !== peerId) return;
  const peer = conversations.get(peerId)?.peer ?? open.peer;
  Object.assign(open, { peer, messages: new Map(), isLoaded: false });
  showPeer();
  await loadNewest(open);
}

/** For screen readers. The history itself is silent, or they would read all of it whenever it is opened. */
function announce(peer, message) {
  const name = nameOf(peer);
  part('announcer').textContent = isLookedAt(peer.id) ? `${name}: ${textOf(message)}` : `New message from ${name}`;
}

/** After a gap that the stream cannot fill. Nothing of what is known needs to be true any more. */
async function reload() {
  conversations = new Map();
  isListed = false;
  await loadConversations();
  if (open) {
    Object.assign(open, { messages: new Map(), isLoaded: false });
    await loadNewest(open);
  }
}

// ---- Conversations

async function loadConversations(page) {
  const answer = await chat.conversations(page);
  for (const { peer, last_message: last, last_seq: lastSeq } of answer.conversations) {
    if (lastSeq >= (conversations.get(peer.id)?.lastSeq ?? 0)) conversations.set(peer.id, { peer, last, lastSeq });
    if (last.sender_id === me.id) markSeen(peer.id, lastSeq);
  }
  if (page || !isListed) nextConversations = answer.next;
  isListed = true;
  showConversations();
  return answer.position;
}

function showConversations() {
  if (open && isLookedAt(open.peer.id)) markSeen(open.peer.id, conversations.get(open.peer.id)?.lastSeq ?? 0);
  const list = [...conversations.values()].sort((a, b) => (a.last.created_at < b.last.created_at ? 1 : -1));
  const focused = document.activeElement?.dataset?.peer;
  const items = list.map((one) => {
    const shown = [one.peer.username, textOf(one.last), one.last.id, countNew(one), open?.peer.id === one.peer.id];
    const state = JSON.stringify(shown);
    return { key: one.peer.id, state, make: () => conversationItem(one) };
  });
  place(part('conversations'), items);
  if (focused) document.querySelector(`[data-peer="${CSS.escape(focused)}"]`)?.focus();
  part('more-conversations').hidden = nextConversations === null;
  part('no-conversations').hidden = list.length > 0;
  const news = list.reduce((sum, one) => sum + countNew(one), 0);
  document.title = news > 0 ? `(${news}) Chat` : 'Chat';
}

const countNew = ({ peer, lastSeq }) => Math.max(0, lastSeq - (seen[peer.id] ?? 0));

function conversationItem(conversation) {
  const { peer, last } = conversation;
  const button = element('button', { type: 'button', className: 'conversation' });
  button.dataset.peer = peer.id;
  button.setAttribute('aria-current', String(open?.peer.id === peer.id));
  button.append(
    element('span', { className: 'name', dir: 'auto', textContent: nameOf(peer) }),
    element('span', { className: 'last', dir: 'auto', textContent: textOf(last).slice(0, 100) }),
  );
  const news = countNew(conversation);
  if (news > 0) {
    const count = element('span', { className: 'new', textContent: news > 99 ? '99+' : String(news) });
    count.append(element('span', { className: 'for-readers', textContent: ' new' }));
    button.append(count);
  }
  button.addEventListener('click', () => openConversation(peer));
  const item = element('li', {});
  item.append(button);
  return item;
}

const nameOf = (peer) => peer.username ?? 'Deleted user';

const textOf = (message) => (message.erased ? 'Message erased' : message.content);

part('more-conversations').addEventListener('click', () => {
  loadConversations(nextConversations).catch(fail);
});

part('find-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const name = part('find').value.trim();
  part('find-fault').textContent = '';
  if (!name) return;
  try {
    const peer = await chat.findUser(name);
    part('find').value = '';
    if (peer.id === me.id) part('find-fault').textContent = 'That is you.';
    else await openConversation(peer);
  } catch (error) {
    if (error.status === 404) part('find-fault').textContent = `There is no user ${name}.`;
    else fail(error);
  }
});

// ---- A conversation

async function openConversation(peer) {
  if (open?.peer.id === peer.id) return part('content').focus();
  showConversation({ peer, messages: new Map(), isLoaded: false, hasFailed: false, hasEarlier: false });
  await loadNewest(open);
}

/** The newest page. If it fails, it is loaded when the stream is back, or when the person asks for it. */
async function loadNewest(conversation) {
  try {
    const page = await chat.messages(conversation.peer.id);
    if (open !== conversation) return;
    page.messages.forEach(addMessage);
    Object.assign(conversation, { isLoaded: true, hasFailed: false, hasEarlier: page.more });
    show('notice', null);
  } catch (error) {
    if (open !== conversation) return;
    conversation.hasFailed = true;
    fail(error);
  }
  showMessages();
  if (me) showConversations();
}

const newest = (conversation) => Math.max(0, ...conversation.messages.keys());

async function loadNewer(conversation) {
  let more = true;
  while (more && open === conversation) {
    const page = await chat.messages(conversation.peer.id, { after: newest(conversation), limit: 100 });
    if (open === conversation) page.messages.forEach(addMessage);
    more = page.more;
  }
}

function showConversation(conversation) {
  // A draft stays with its conversation: it must not go to another person.
  if (open) drafts.set(open.peer.id, part('content').value);
  open = conversation;
  part('chat').dataset.shows = conversation ? 'conversation' : 'list';
  showPeer();
  part('content').value = drafts.get(conversation?.peer.id) ?? '';
  show('notice', null);
  part('messages').replaceChildren();
  atEnd = true;
  showMessages();
  showConversations();
  if (conversation) part(part('write-form').hidden ? 'peer' : 'content').focus();
}

function showPeer() {
  part('peer').textContent = open ? nameOf(open.peer) : 'No conversation is open';
  // Nobody reads what is written to a deleted user.
  part('write-form').hidden = !open || open.peer.username === null;
}

part('back').addEventListener('click', () => {
  const peerId = open?.peer.id;
  showConversation(null);
  document.querySelector(`[data-peer="${CSS.escape(peerId ?? '')}"]`)?.focus();
});

part('conversation').addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && open) part('back').click();
});

function addMessage(message) {
  open.messages.set(message.seq, message);
}

function showMessages() {
  const stayAtEnd = atEnd;
  const stored = [...(open?.messages.values() ?? [])].sort((a, b) => a.seq - b.seq);
  const items = stored.map((message) => ({
    key: message.id,
    state: JSON.stringify([message.erased ?? false, open.peer.username]),
    make: () => messageItem(message),
  }));
  const waiting = unsent.filter((message) => message.peer.id === open?.peer.id).map((message) => {
    return { key: message.key, state: String(message.fault), make: () => unsentItem(message) };
  });
  place(part('messages'), [...items, ...waiting]);
  part('earlier').hidden = !(open?.hasEarlier || open?.hasFailed);
  part('earlier').textContent = open?.hasFailed ? 'Load messages' : 'Earlier messages';
  if (stayAtEnd) scrollToEnd();
}

/** Whether the newest message is in view. It stays there, also when a keyboard takes half of the screen. */
let atEnd = true;

function scrollToEnd() {
  part('history').scrollTop = part('history').scrollHeight;
  atEnd = true;
}

part('history').addEventListener('scroll', ({ target }) => {
  atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
});

new ResizeObserver(() => atEnd && scrollToEnd()).observe(part('history'));

function messageItem(message) {
  const time = new Date(message.created_at);
  const isToday = time.toDateString() === new Date().toDateString();
  const style = isToday ? { timeStyle: 'short' } : { dateStyle: 'medium', timeStyle: 'short' };
  const textContent = time.toLocaleString([], style);
  const about = element('time', { className: 'about', dateTime: message.created_at, textContent });
  const item = bubble(message.sender_id === me.id, textOf(message), about);
  item.classList.toggle('erased', message.erased ?? false);
  return item;
}

function unsentItem(message) {
  const about = element('span', { className: 'about' });
  about.textContent = 'Sending…';
  if (message.fault) {
    about.classList.add('unsent');
    about.textContent = `Not sent: ${message.fault}`;
    for (const [textContent, className, act] of [
      ['Send again', 'again', send],
      ['Discard', 'discard', forget],
    ]) {
      const button = element('button', { type: 'button', textContent, className });
      button.addEventListener('click', () => {
        act(message);
        // The button is gone.
        part('content').focus();
      });
      about.append(button);
    }
  }
  return bubble(true, message.content, about);
}

function bubble(isMine, content, about) {
  const item = element('li', { className: isMine ? 'mine' : '' });
  item.append(
    element('span', { className: 'for-readers', textContent: isMine ? 'You: ' : `${nameOf(open.peer)}: ` }),
    element('div', { className: 'text', dir: 'auto', textContent: content }),
    about,
  );
  return item;
}

part('earlier').addEventListener('click', async () => {
  const conversation = open;
  if (!conversation.isLoaded) return loadNewest(conversation);
  const history = part('history');
  const fromEnd = history.scrollHeight - history.scrollTop;
  try {
    const page = await chat.messages(conversation.peer.id, { before: Math.min(...conversation.messages.keys()) });
    if (open !== conversation) return;
    page.messages.forEach(addMessage);
    conversation.hasEarlier = page.more;
    showMessages();
    history.scrollTop = history.scrollHeight - fromEnd;
  } catch (error) {
    if (open === conversation) fail(error);
  }
});

// ---- Sending

part('content').addEventListener('keydown', (event) => {
  // Enter also ends the composition of a character.
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    part('write-form').requestSubmit();
  }
});

part('write-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const content = part('content').value.trim();
  if (!open || content === '') return;
  const length = [...content].length;
  if (length > CONTENT_MAX) {
    return show('notice', `A message has at most ${CONTENT_MAX} characters; this one has ${length}.`);
  }
  show('notice', null);
  part('content').value = '';
  send({ peer: open.peer, content, key: newKey(), at: Date.now() });
});

/** Sends it for the first time or again, always under its own key, so that it is stored once. */
function send(message) {
  message.fault = null;
  if (!unsent.includes(message)) unsent.push(message);
  keepUnsent();
  showMessages();
  scrollToEnd();
  sending = sending.then(() => sendNow(message));
}

async function sendNow(message) {
  // Discarded while it waited for its turn.
  if (!unsent.includes(message)) return;
  const session = leaving;
  try {
    const stored = await chat.send(message.peer.id, message.content, message.key);
    forget(message);
    if (open?.peer.id === message.peer.id) addMessage(stored);
    showMessages();
    // The stream has it, too, and tries again.
    arrived(stored).catch(() => {});
  } catch (error) {
    if (session !== leaving) return;
    message.fault = error.status === 403 ? 'You cannot write to this person.' : words(error);
    showMessages();
    if (error.status === 401) fail(error);
  }
}

function forget(message) {
  unsent = unsent.filter((one) => one !== message);
  keepUnsent();
  showMessages();
}

/** For when the page is loaded again, or the session ends, before there is an answer. */
function keepUnsent() {
  const messages = unsent.map(({ peer, content, key, at }) => ({ peer, content, key, at }));
  if (messages.length > 0) sessionStorage.setItem(UNSENT, JSON.stringify({ user: me.id, messages }));
  else sessionStorage.removeItem(UNSENT);
}

function restoreUnsent() {
  const kept = JSON.parse(sessionStorage.getItem(UNSENT) ?? '{}');
  sessionStorage.removeItem(UNSENT);
  if (kept.user !== me.id) return;
  for (const message of kept.messages) {
    if (Date.now() - message.at < KEY_LIMIT_MS) send(message);
    else unsent.push({ ...message, fault: 'it is more than a day old, and may have arrived.' });
  }
  keepUnsent();
}

/**
 * Makes these the items of a list. Those that are there and have not changed stay where they are: they keep the focus, and
 * a screen reader reads the others alone.
 */
function place(list, wanted) {
  const there = new Map([...list.children].map((item) => [item.dataset.key, item]));
  wanted.forEach(({ key, state, make }, index) => {
    let item = there.get(key);
    if (item?.dataset.state !== state) {
      item?.remove();
      item = make();
      Object.assign(item.dataset, { key, state });
    }
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
  while (list.children.length > wanted.length) list.lastElementChild.remove();
}

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

/** Goes on with the session from before the page was loaded again. */
async function resume() {
  try {
    await enter();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return showEntrance(farewell(error));
    part('entrance').hidden = false;
    part('entrance-form').hidden = true;
    show('entrance-notice', `${words(error)} The page goes on by itself.`);
    setTimeout(resume, 2000 + 3000 * Math.random());
  }
}

beginSession();
chat.tokens = JSON.parse(sessionStorage.getItem(TOKENS));
if (chat.tokens) resume();
else showEntrance();
