//! A Redis database for one test.

use std::time::Duration;

use deadpool_redis::redis;

use super::given;

/// The server has this many. The first one keeps the number that was claimed last.
const INDEXES: i64 = 4096;

pub(crate) struct RedisIndex {
    url: String,
}

impl RedisIndex {
    /// The next index, emptied. The server counts, so that no two test runs share one.
    pub(crate) async fn claim() -> Self {
        let base = given("TEST_REDIS_URL");
        let base = match base.rsplit_once('/') {
            Some((server, index)) if index.is_empty() || index.parse::<u32>().is_ok() => server.to_owned(),
            _ => base,
        };
        let mut first = connect(&format!("{base}/0")).await;
        let number: i64 =
            redis::cmd("INCR").arg("tests:claimed").query_async(&mut first).await.expect("Redis counts");
        let claimed = Self { url: format!("{base}/{}", 1 + number % (INDEXES - 1)) };
        claimed.flush().await;
        claimed
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Deletes all data.
    pub(crate) async fn flush(&self) {
        self.run::<()>(redis::cmd("FLUSHDB").arg("SYNC")).await;
    }

    pub(crate) async fn run<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> T {
        let mut connection = connect(&self.url).await;
        command.query_async(&mut connection).await.expect("Redis answers")
    }
}

async fn connect(url: &str) -> redis::aio::MultiplexedConnection {
    let client = redis::Client::open(url).expect("TEST_REDIS_URL is a URL of Redis");
    let config = redis::AsyncConnectionConfig::new()
        .set_connection_timeout(Some(Duration::from_secs(10)))
        .set_response_timeout(Some(Duration::from_secs(10)));
    client.get_multiplexed_async_connection_with_config(&config).await.expect("Redis at TEST_REDIS_URL")
}
