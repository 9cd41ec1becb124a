//! Whether the service can work with its database: the encoding, and what its role may do.
//!
//! Migrations may run as another role, the owner of the schema. Then the service's role has what it was granted.

use std::fmt;

use sqlx::PgConnection;

/// The tables of the service, and what its statements need on each.
pub const NEEDED: [(&str, &[&str]); 17] = [
    ("_sqlx_migrations", &["SELECT"]),
    // UPDATE, because a start corrects the keys of addresses.
    ("users", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("conversations", &["SELECT", "INSERT", "UPDATE"]),
    // UPDATE for a database that was restored from another server, DELETE for retention.
    ("messages", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    // UPDATE, because the sweep locks the rows that it deletes.
    ("idempotency_keys", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("window_suspension", &["SELECT", "INSERT", "UPDATE"]),
    ("deleted_users", &["SELECT", "INSERT", "DELETE"]),
    ("sessions", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("ended_sessions", &["SELECT", "INSERT", "DELETE"]),
    ("blocks", &["SELECT", "INSERT", "DELETE"]),
    ("new_conversations", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("exports", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("reserved_names", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("erasures", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("erased_conversations", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("position_server", &["SELECT", "INSERT", "UPDATE"]),
    ("message_retention", &["SELECT", "UPDATE"]),
];

/// The only encoding that holds every text.
pub(crate) const ENCODING: &str = "UTF8";

/// A condition of SQL: the role has the privilege on the table, or on some of its columns, to which an operator may have
/// restricted it. It is null where there is no such table.
const HELD: &str = "CASE privilege WHEN 'DELETE' THEN has_table_privilege(relation, privilege)
                         ELSE has_any_column_privilege(relation, privilege) END";

/// What a database has to be asked for each second. It fails where the role may not read the table of the migrations.
pub(crate) fn probe() -> String {
    format!(
        "SELECT (SELECT max(version) FROM _sqlx_migrations WHERE success),
                getdatabaseencoding()::text,
                (SELECT count(*) FROM (SELECT to_regclass(name) AS relation, privilege
                                       FROM unnest($1::text[], $2::text[]) AS t (name, privilege)) AS needed
                 WHERE {HELD} IS NOT TRUE),
                pg_is_in_recovery(),
                current_setting('transaction_read_only')::boolean"
    )
}

/// The tables and privileges of [`NEEDED`], a pair per privilege.
pub(crate) fn needed() -> (Vec<&'static str>, Vec<&'static str>) {
    NEEDED.iter().flat_map(|(table, all)| all.iter().map(|privilege| (*table, *privilege))).unzip()
}

/// A database whose encoding cannot hold every text.
#[derive(thiserror::Error, Clone, Debug, PartialEq, Eq)]
#[error(
    "the database {database} has the encoding {encoding}, which cannot hold every text: the service needs UTF8. Create \
     another with `CREATE DATABASE ... ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0`, move the data with pg_dump and \
     pg_restore, and correct DB_NAME or DATABASE_URL"
)]
pub struct NotUtf8 {
    database: String,
    encoding: String,
}

/// `None` if the database is in UTF8.
pub(crate) async fn encoding(connection: &mut PgConnection) -> Result<Option<NotUtf8>, sqlx::Error> {
    let query = "SELECT current_database()::text, getdatabaseencoding()::text";
    let (database, encoding): (String, String) = sqlx::query_as(query).fetch_one(connection).await?;
    Ok((encoding != ENCODING).then_some(NotUtf8 { database, encoding }))
}

/// What the service's role lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lacking {
    role: String,
    /// Statements that give the role all of it.
    pub statements: Vec<String>,
    /// Tables that are nowhere in the database.
    absent: Vec<String>,
    /// False where `search_path` does not lead to the tables: then they may be another installation's.
    pub(crate) is_on_path: bool,
}

impl Lacking {
    pub(crate) fn count(&self) -> usize {
        self.statements.len() + self.absent.len()
    }

    pub fn is_nothing(&self) -> bool {
        self.statements.is_empty() && self.absent.is_empty()
    }

    /// What is wrong; the statements are the fix.
    pub fn fault(&self) -> String {
        let Self { role, absent, .. } = self;
        if !self.is_on_path {
            "search_path leads to no migrated tables: migrate, or, if those that the database has elsewhere are meant, run \
             this as their owner"
                .to_owned()
        } else if absent.is_empty() {
            format!(
                "the role {role} may not use all that the service needs: run this as the owner of the tables"
            )
        } else {
            format!("there is no table {}: restore what was dropped", absent.join(", "))
        }
    }
}

/// One line, for logs.
impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fault())?;
        if self.statements.is_empty() { Ok(()) } else { write!(f, ": {}", self.statements.join(" ")) }
    }
}

/// One table of the service as the role sees it. All names are quoted where SQL needs it.
#[derive(sqlx::FromRow)]
struct Table {
    role: String,
    database: String,
    schema: String,
    owner: Option<String>,
    name: String,
    exists: bool,
    may_use_schema: bool,
    is_on_path: bool,
    /// Joined by commas.
    lacking: Option<String>,
}

/// Finds the tables also where the role cannot see them: in a schema that it may not use, or that its `search_path` does
/// not name. `None` where nothing was migrated yet.
pub(crate) async fn lacking(connection: &mut PgConnection) -> Result<Option<Lacking>, sqlx::Error> {
    let query = format!(
        "WITH needed AS (
             SELECT name, privilege, n FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (name, privilege, n)
         ), path AS (
             SELECT trim(both ' \"' FROM schema) AS schema
             FROM unnest(string_to_array(replace(current_setting('search_path'), '\"$user\"', current_user), ',')) AS t (schema)
         ), home AS (
             -- The schema that search_path leads to, else one that has all tables.
             SELECT s.oid, s.nspname
             FROM pg_namespace s JOIN pg_class c ON c.relnamespace = s.oid
             WHERE c.relname IN (SELECT name FROM needed) AND c.relkind IN ('r', 'p')
             GROUP BY s.oid, s.nspname
             HAVING bool_or(c.oid = to_regclass('_sqlx_migrations'))
                 OR count(*) = (SELECT count(DISTINCT name) FROM needed)
             ORDER BY bool_or(c.oid = to_regclass('_sqlx_migrations')) IS TRUE DESC,
                      s.nspname IN (SELECT schema FROM path) DESC, s.nspname
             LIMIT 1
         ), found AS (
             SELECT needed.*, c.oid AS relation, c.relowner FROM needed CROSS JOIN home
             LEFT JOIN pg_class c ON c.relnamespace = home.oid AND c.relname = needed.name
         )
         SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database,
                quote_ident(home.nspname) AS schema, quote_ident(pg_get_userbyid(relowner)) AS owner,
                quote_ident(name) AS name, relation IS NOT NULL AS exists,
                has_schema_privilege(home.oid, 'USAGE') AS may_use_schema,
                home.nspname IN (SELECT schema FROM path) AS is_on_path,
                string_agg(privilege, ', ' ORDER BY n) FILTER (WHERE NOT {HELD}) AS lacking
         FROM found CROSS JOIN home
         GROUP BY home.oid, home.nspname, name, relation, relowner
         ORDER BY min(n)"
    );
    let (names, privileges) = needed();
    let tables: Vec<Table> =
        sqlx::query_as(sqlx::AssertSqlSafe(query)).bind(names).bind(privileges).fetch_all(connection).await?;
    let Some(first) = tables.first() else { return Ok(None) };
    Ok(Some(Lacking {
        role: first.role.clone(),
        statements: statements(&tables, first),
        absent: tables.iter().filter(|table| !table.exists).map(|table| table.name.clone()).collect(),
        is_on_path: first.is_on_path,
    }))
}

fn statements(tables: &[Table], Table { role, database, schema, .. }: &Table) -> Vec<String> {
    let mut statements = Vec::new();
    if tables.iter().any(|table| !table.may_use_schema) {
        statements.push(format!("GRANT USAGE ON SCHEMA {schema} TO {role};"));
    }
    for Table { name, lacking, .. } in tables {
        if let Some(privileges) = lacking {
            statements.push(format!("GRANT {privileges} ON {schema}.{name} TO {role};"));
        }
    }
    let owner = tables.iter().filter(|table| table.lacking.is_some()).find_map(|table| table.owner.as_ref());
    if let Some(owner) = owner {
        // For the tables of later releases.
        statements.push(format!(
            "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA {schema} \
             GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role};"
        ));
    }
    if tables.iter().any(|table| !table.is_on_path) {
        statements.push(format!("ALTER ROLE {role} IN DATABASE {database} SET search_path = {schema};"));
    }
    statements
}
