//! The faults, and the alerts that each has to fire. Those of one lane run one after the other on the same replicas;
//! lanes run at the same time.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::PASSWORD;
use harness::Replica;
use harness::servers::daemon;
use load::Script;
use serde_json::json;
use tests::proxy::Link;

use super::scene::{DATABASE, Scene, lock};

pub(super) struct Drill {
    pub(super) lane: Lane,
    /// What happens, in the table's words.
    pub(super) fault: &'static str,
    /// All of them have to fire, and to resolve when the fault is gone.
    pub(super) alerts: &'static [&'static str],
    pub(super) inject: fn(&Scene) -> Result<()>,
    pub(super) heal: fn(&Scene) -> Result<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// A dependency is unavailable.
    Outages,
    /// Overload.
    Overload,
    /// Requests fail although all dependencies are available.
    Errors,
    /// Requests are slow.
    Latency,
}

impl Lane {
    pub(super) const ALL: [Self; 4] = [Self::Outages, Self::Overload, Self::Errors, Self::Latency];

    pub(super) fn namespace(self) -> &'static str {
        match self {
            Self::Outages => "drill-outages",
            Self::Overload => "drill-overload",
            Self::Errors => "drill-errors",
            Self::Latency => "drill-latency",
        }
    }

    /// What its replicas are configured with beyond the usual.
    pub(super) fn environment(self, collector: u16) -> Vec<(&'static str, String)> {
        match self {
            Self::Outages => vec![
                ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{collector}")),
                // The load is small, and a tenth of it is hardly anything.
                ("OTEL_TRACES_SAMPLER", "parentbased_always_on".to_owned()),
                // A batch is sent after so many milliseconds: the exporter's clock keeps up with that of the rules.
                ("OTEL_BSP_SCHEDULE_DELAY", "500".to_owned()),
            ],
            // A small pool. Requests are given up a little later than the wait for a connection is, so that a few hundred
            // clients are a crowd: the outbox keeps what its client no longer waits for. Statements are not given up.
            Self::Overload => vec![
                ("DB_POOL_MAX", "6".to_owned()),
                ("REQUEST_TIMEOUT_MS", "4000".to_owned()),
                ("DB_STATEMENT_TIMEOUT_MS", "60000".to_owned()),
                ("REGISTER_RATE_LIMIT_PER_MINUTE", "30".to_owned()),
                ("STREAMS_MAX", "2".to_owned()),
            ],
            Self::Errors | Self::Latency => Vec::new(),
        }
    }
}

pub(super) const DRILLS: [Drill; 17] = [
    Drill {
        lane: Lane::Outages,
        fault: "one of two replicas killed",
        alerts: &["ChatServiceReplicaDown"],
        inject: |scene| {
            scene.replicas[1].kill();
            Ok(())
        },
        heal: |scene| scene.replicas[1].launch(),
    },
    Drill {
        lane: Lane::Outages,
        fault: "both replicas killed",
        alerts: &["ChatServiceDown"],
        inject: |scene| {
            scene.replicas.iter().for_each(Replica::kill);
            Ok(())
        },
        heal: |scene| scene.replicas.iter().try_for_each(Replica::launch),
    },
    Drill {
        lane: Lane::Outages,
        fault: "Postgres killed",
        alerts: &["ChatServicePostgresDown", "ChatServiceNotReady"],
        inject: |scene| lock(&scene.postgres).kill(),
        heal: |scene| lock(&scene.postgres).restart(),
    },
    Drill {
        lane: Lane::Outages,
        fault: "one replica cut off from Postgres",
        alerts: &["ChatServiceReplicaNotReady"],
        inject: |scene| {
            scene.to_postgres[1].set(Link::Cut);
            Ok(())
        },
        heal: |scene| {
            scene.to_postgres[1].set(Link::Open);
            Ok(())
        },
    },
    Drill {
        lane: Lane::Outages,
        fault: "Redis stopped",
        alerts: &["ChatServiceRedisDown"],
        inject: |scene| lock(&scene.redis).stop(),
        heal: |scene| lock(&scene.redis).restart(),
    },
    Drill {
        lane: Lane::Outages,
        fault: "newest migration taken back",
        alerts: &["ChatServiceSchemaBehind"],
        inject: |scene| {
            scene.sql(
                "CREATE TABLE taken AS TABLE _sqlx_migrations;
                 DELETE FROM _sqlx_migrations WHERE version = (SELECT max(version) FROM taken)",
            )
        },
        heal: |scene| {
            scene.sql(
                "INSERT INTO _sqlx_migrations SELECT * FROM taken ON CONFLICT DO NOTHING; DROP TABLE taken",
            )
        },
    },
    Drill {
        lane: Lane::Outages,
        fault: "the collector of traces gone",
        alerts: &["ChatServiceTraceExportFailing"],
        inject: |scene| {
            scene.collector.stop();
            Ok(())
        },
        heal: |scene| scene.collector.listen(),
    },
    Drill {
        lane: Lane::Overload,
        fault: "400 clients log in with wrong passwords",
        alerts: &["ChatServiceAuthFailures", "ChatServicePasswordQueueFilling"],
        inject: |scene| {
            scene.crowd(200, |address, user, _| {
                let body = json!({"username": user.name, "password": "wrong, and wrong again"}).to_string();
                Script::post(address, "/login", None, &[body])
            });
            Ok(())
        },
        heal: Scene::disperse,
    },
    Drill {
        lane: Lane::Overload,
        fault: "more registrations than are allowed",
        alerts: &["ChatServiceRateLimitSurge"],
        inject: |scene| {
            scene.crowd(1, |address, user, _| {
                // Known names: what the limit lets through makes no user.
                let body = json!({"username": user.name, "email": "x@example.com", "password": PASSWORD});
                Script::post(address, "/register", None, &[body.to_string()])
            });
            Ok(())
        },
        heal: Scene::disperse,
    },
    Drill {
        lane: Lane::Overload,
        fault: "messages locked, 1000 clients send",
        alerts: &["ChatServiceOutboxBackingUp"],
        inject: |scene| {
            lock_messages(scene)?;
            scene.crowd(500, |address, from, to| {
                let body = json!({"recipient_id": to.id, "content": "Is anybody there?"}).to_string();
                Script::post(address, "/send", Some(&from.token), &[body])
            });
            Ok(())
        },
        heal: unlock_messages,
    },
    Drill {
        lane: Lane::Overload,
        fault: "messages locked, 40 clients read",
        alerts: &["ChatServicePoolExhausted"],
        inject: |scene| {
            lock_messages(scene)?;
            scene.crowd(20, |address, from, to| {
                // Too deep for the window in Redis.
                Script::get(address, &format!("/messages?peer_id={}&offset=60", to.id), &from.token)
            });
            Ok(())
        },
        heal: unlock_messages,
    },
    Drill {
        lane: Lane::Overload,
        fault: "more streams than allowed, opened at once",
        alerts: &["ChatServiceStreamReconnects", "ChatServiceStreamsNearLimit"],
        inject: |scene| {
            scene.follow_in_a_loop();
            Ok(())
        },
        heal: Scene::disperse,
    },
    Drill {
        lane: Lane::Overload,
        fault: "Redis refuses PUBLISH",
        alerts: &["ChatServiceStreamGaps", "ChatServiceStreamDeliverySlow"],
        // A replica that stores messages itself would find the other's with them.
        inject: |scene| {
            scene.talk_to_one();
            lock(&scene.redis).cli(&["acl", "setuser", "default", "-publish"]).map(drop)
        },
        heal: |scene| {
            scene.talk();
            lock(&scene.redis).cli(&["acl", "setuser", "default", "+publish"]).map(drop)
        },
    },
    Drill {
        lane: Lane::Errors,
        fault: "a trigger refuses the canary's messages",
        alerts: &["ChatServiceCanaryFailing"],
        // All replicas stay ready.
        inject: |scene| {
            scene.sql(
                "CREATE FUNCTION refuse_canary() RETURNS trigger LANGUAGE plpgsql AS
                     'BEGIN RAISE EXCEPTION ''drill''; END';
                 CREATE TRIGGER refuse_canary BEFORE INSERT ON messages FOR EACH ROW
                     WHEN (NEW.content LIKE 'canary %') EXECUTE FUNCTION refuse_canary()",
            )
        },
        heal: |scene| scene.sql("DROP TRIGGER refuse_canary ON messages; DROP FUNCTION refuse_canary()"),
    },
    Drill {
        lane: Lane::Errors,
        fault: "the canary's messages deleted",
        alerts: &["ChatServiceCanaryLostMessage"],
        inject: |scene| {
            scene.sql("DELETE FROM messages WHERE content LIKE 'canary %'")?;
            // With the window of the conversation, which shows them still.
            lock(&scene.redis).cli(&["flushall"]).map(drop)
        },
        heal: |_| Ok(()),
    },
    Drill {
        lane: Lane::Errors,
        fault: "a trigger refuses every message: 500s",
        alerts: &[
            "ChatServiceInternalErrors",
            "ChatServiceSendsFailing",
            "ChatServiceErrorBudgetBurn 1h",
            "ChatServiceErrorBudgetBurn 6h",
            "ChatServiceErrorBudgetBurn 1d",
            "ChatServiceErrorBudgetBurn 3d",
        ],
        // An unexpected error: a missing table would be a 503.
        inject: |scene| {
            scene.sql(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                     'BEGIN RAISE EXCEPTION ''drill''; END';
                 CREATE TRIGGER refuse BEFORE INSERT ON messages EXECUTE FUNCTION refuse()",
            )
        },
        heal: |scene| scene.sql("DROP TRIGGER refuse ON messages; DROP FUNCTION refuse()"),
    },
    Drill {
        lane: Lane::Latency,
        fault: "200 ms more each way to Postgres",
        alerts: &[
            "ChatServicePostgresSlow",
            "ChatServiceLatencyBudgetBurn 1h",
            "ChatServiceLatencyBudgetBurn 6h",
            "ChatServiceLatencyBudgetBurn 1d",
            "ChatServiceLatencyBudgetBurn 3d",
        ],
        inject: |scene| {
            scene.links_to_postgres(Link::Slow(Duration::from_millis(200)));
            Ok(())
        },
        heal: |scene| {
            scene.links_to_postgres(Link::Open);
            Ok(())
        },
    },
];

/// All reads and writes of messages wait, each with a connection of the pool. Readiness reads another table, and stays.
fn lock_messages(scene: &Scene) -> Result<()> {
    let locked = {
        let postgres = lock(&scene.postgres);
        let (port, password) = (postgres.port(), postgres.password().to_owned());
        // Ends with its session, which `heal` ends.
        thread::spawn(move || {
            let login = harness::servers::sql::Login {
                host: "127.0.0.1",
                port,
                user: "postgres",
                password: &password,
                database: DATABASE,
            };
            harness::servers::sql::query(login, "BEGIN; LOCK TABLE messages; SELECT pg_sleep(55)")
        })
    };
    let is_held = || {
        let rows = lock(&scene.postgres).query(
            DATABASE,
            "SELECT 1 FROM pg_locks WHERE relation = 'messages'::regclass AND mode = 'AccessExclusiveLock' AND granted",
        )?;
        Ok((!rows.is_empty() || locked.is_finished()).then_some(()))
    };
    daemon::poll(Duration::from_secs(20), is_held)?.context("messages cannot be locked")?;
    Ok(())
}

fn unlock_messages(scene: &Scene) -> Result<()> {
    scene.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK%'")?;
    scene.disperse()
}
