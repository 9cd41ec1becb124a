//! The server whose transactions the columns `xact`, `last_xact` and `removed_xact` name.

use sqlx::PgConnection;

/// Rows in one statement.
const STEP_ROWS: i64 = 10_000;

/// Notes the server. In a database that was restored from a dump of another one, transactions may have numbers that this
/// server has yet to reach: then old messages would seem new. They lose their numbers, which belong to no position here.
///
/// It runs after the migrations, each time, and finds nothing to do when it is done.
pub(super) async fn adopt(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let is_known = sqlx::query_scalar!(
        r#"SELECT EXISTS (
               SELECT FROM position_server p JOIN pg_control_system() c ON c.system_identifier = p.system_identifier
           ) AS "is_known!""#
    );
    if is_known.fetch_one(&mut *connection).await? {
        return Ok(());
    }
    loop {
        let step = sqlx::query!(
            "UPDATE messages SET xact = NULL
             WHERE (conversation_id, seq) IN (
                 SELECT conversation_id, seq FROM messages
                 WHERE xact >= pg_snapshot_xmax(pg_current_snapshot()) ORDER BY xact LIMIT $1
             )",
            STEP_ROWS,
        );
        if step.execute(&mut *connection).await?.rows_affected() == 0 {
            break;
        }
    }
    let conversations = sqlx::query!(
        "UPDATE conversations SET last_xact = NULL WHERE last_xact >= pg_snapshot_xmax(pg_current_snapshot())"
    );
    conversations.execute(&mut *connection).await?;
    let removed = sqlx::query!(
        "UPDATE conversations SET removed_xact = NULL WHERE removed_xact >= pg_snapshot_xmax(pg_current_snapshot())"
    );
    removed.execute(&mut *connection).await?;
    let erased = sqlx::query!(
        "DELETE FROM erased_conversations WHERE xact >= pg_snapshot_xmax(pg_current_snapshot())"
    );
    erased.execute(&mut *connection).await?;
    let note = sqlx::query!(
        "INSERT INTO position_server (system_identifier) SELECT system_identifier FROM pg_control_system()
         ON CONFLICT (only_row) DO UPDATE SET system_identifier = excluded.system_identifier"
    );
    note.execute(connection).await.map(drop)
}
