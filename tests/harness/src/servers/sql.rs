//! The least Postgres client that creates a database and applies a script: no installed `psql`, no runtime, no crate.
//! It speaks the simple query protocol without TLS to a server that asks for no password or a plain one.

use std::io::{BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

const PROTOCOL: i32 = 196_608; // 3.0
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// The longest pause between two messages: migrations on test data take a fraction of it.
const READ_LIMIT: Duration = Duration::from_secs(60);
/// No message of ours is near that; a wrong peer's first bytes read as a length easily are.
const MESSAGE_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// One row as text; NULL is `None`.
pub type Row = Vec<Option<String>>;

#[derive(Clone, Copy, Debug)]
pub struct Login<'a> {
    pub host: &'a str,
    pub port: u16,
    pub user: &'a str,
    pub password: &'a str,
    pub database: &'a str,
}

/// Runs one or several statements and returns the rows of all of them.
pub fn query(login: Login<'_>, sql: &str) -> Result<Vec<Row>> {
    let mut session = Session::open(login)?;
    session.send(Some(b'Q'), &[sql.as_bytes(), b"\0"].concat())?;
    let rows = session.read_until_ready(login)?;
    session.send(Some(b'X'), &[])?;
    Ok(rows)
}

struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    fn open(login: Login<'_>) -> Result<Self> {
        let place = format!("{}:{}", login.host, login.port);
        let address = place.to_socket_addrs()?.next().ok_or_else(|| anyhow!("{place} has no address"))?;
        let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)
            .with_context(|| format!("connect to {place}"))?;
        stream.set_read_timeout(Some(READ_LIMIT))?;
        stream.set_write_timeout(Some(CONNECT_LIMIT))?;
        stream.set_nodelay(true)?;
        let mut session = Self { stream: BufReader::new(stream) };
        let mut hello = PROTOCOL.to_be_bytes().to_vec();
        for word in ["user", login.user, "database", login.database, "client_encoding", "UTF8"] {
            hello.extend_from_slice(word.as_bytes());
            hello.push(0);
        }
        hello.push(0);
        session.send(None, &hello)?;
        session.read_until_ready(login)?;
        Ok(session)
    }

    fn send(&mut self, tag: Option<u8>, body: &[u8]) -> Result<()> {
        let length = i32::try_from(body.len() + 4).context("message too long")?;
        let message = [tag.as_slice(), &length.to_be_bytes(), body].concat();
        Ok(self.stream.get_mut().write_all(&message)?)
    }

    fn receive(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).context("the server hung up")?;
        let length = i32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let length =
            usize::try_from(length).ok().and_then(|length| length.checked_sub(4)).context("a bad length")?;
        if length > MESSAGE_LIMIT_BYTES {
            bail!("a message of {length} bytes: not a Postgres server?");
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok((head[0], body))
    }

    /// Reads up to the server's "ready for query", answering its wish for a password on the way.
    fn read_until_ready(&mut self, login: Login<'_>) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let (tag, body) = self.receive().map_err(|error| failure.take().unwrap_or(error))?;
            match tag {
                b'R' => match number(&body, 0) {
                    Some(0) => {}
                    Some(3) => self.send(Some(b'p'), &[login.password.as_bytes(), b"\0"].concat())?,
                    other => {
                        bail!("this server wants authentication of kind {other:?}, not a plain password")
                    }
                },
                b'D' => rows.push(row(&body).context("a broken row")?),
                b'E' => failure = Some(server_error(&body)),
                b'Z' => return failure.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }
}

fn number(body: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_be_bytes(body.get(at..at + 4)?.try_into().ok()?))
}

fn row(body: &[u8]) -> Option<Row> {
    let columns = u16::from_be_bytes(body.get(..2)?.try_into().ok()?);
    let mut at = 2;
    let mut row = Row::new();
    for _ in 0..columns {
        let length = number(body, at)?;
        at += 4;
        // -1 is NULL.
        row.push(match usize::try_from(length) {
            Ok(length) => {
                let text = body.get(at..at + length)?;
                at += length;
                Some(String::from_utf8_lossy(text).into_owned())
            }
            Err(_) => None,
        });
    }
    Some(row)
}

/// The fields of an error message are zero-ended, each with a letter before it: `C` is the code, `M` the message.
fn server_error(body: &[u8]) -> anyhow::Error {
    let text = String::from_utf8_lossy(body);
    let field =
        |letter: char| text.split('\0').find_map(|field| field.strip_prefix(letter)).unwrap_or_default();
    anyhow!("Postgres says: {} ({})", field('M'), field('C'))
}
