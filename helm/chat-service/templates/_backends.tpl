{{/* Addresses of Postgres and Redis, and the Secrets with their passwords. */}}

{{- define "chat-service.secretKeySecret" -}}
{{- default (include "chat-service.fullname" .) .Values.secretKey.existingSecret }}
{{- end }}
{{- define "chat-service.secretKeyKey" -}}
{{- ternary .Values.secretKey.existingSecretKey "secret-key" (not (empty .Values.secretKey.existingSecret)) }}
{{- end }}
{{- define "chat-service.secretKeyPreviousKey" -}}
{{- ternary .Values.secretKey.existingSecretPreviousKey "secret-key-previous" (not (empty .Values.secretKey.existingSecret)) }}
{{- end }}

{{/* The bundled Postgres's password, as a secretKeyRef. */}}
{{- define "chat-service.postgresPassword" -}}
{{- with .Values.postgres.auth -}}
name: {{ default (include "chat-service.fullname" $) .existingSecret }}
key: {{ ternary .existingSecretPasswordKey "postgres-password" (not (empty .existingSecret)) }}
{{- end }}
{{- end }}

{{/* The bundled Redis's password, as a secretKeyRef. */}}
{{- define "chat-service.redisPassword" -}}
{{- with .Values.redis.auth -}}
name: {{ default (include "chat-service.fullname" $) .existingSecret }}
key: {{ ternary .existingSecretPasswordKey "redis-password" (not (empty .existingSecret)) }}
{{- end }}
{{- end }}

{{/*
Arguments for the keys that are still to be generated, in the Secret named after the release: neither the user provides them, nor does the
cluster have them. Where no cluster can be asked (`helm template`, Argo CD), all that the user does not provide.
*/}}
{{- define "chat-service.keysToGenerate" -}}
{{- $present := (lookup "v1" "Secret" .Release.Namespace (include "chat-service.fullname" .)).data | default dict }}
{{- if not (or .Values.secretKey.existingSecret (hasKey $present "secret-key")) }}
- --key=secret-key=48
{{- end }}
{{- if and .Values.postgres.enabled (not (or .Values.postgres.auth.existingSecret (hasKey $present "postgres-password"))) }}
- --key=postgres-password=32
{{- end }}
{{- if and .Values.redis.enabled (not (or .Values.redis.auth.existingSecret (hasKey $present "redis-password"))) }}
- --key=redis-password=32
{{- end }}
{{- if and .Values.canary.enabled (not (or .Values.canary.existingSecret (hasKey $present "canary-password"))) }}
- --key=canary-password=32
{{- end }}
{{- end }}

{{/* A variable from a key of a Secret, or else a plain value: (list NAME secret key value). */}}
{{- define "chat-service.envFrom" -}}
- name: {{ index . 0 }}
{{- if index . 2 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 }}
      key: {{ index . 2 }}
{{- else }}
  value: {{ index . 3 | quote }}
{{- end }}
{{- end }}

{{- define "chat-service.postgresEnv" -}}
{{- if .Values.postgres.enabled -}}
- name: DB_HOST
  value: {{ include "chat-service.partName" (list $ "postgres") }}
- name: DB_PORT
  value: "5432"
- name: DB_NAME
  value: {{ .Values.postgres.auth.database | quote }}
- name: DB_USER
  value: {{ .Values.postgres.auth.username | quote }}
- name: DB_PASSWORD
  valueFrom:
    secretKeyRef:
      {{- include "chat-service.postgresPassword" . | nindent 6 }}
{{- else -}}
{{- with .Values.externalPostgres -}}
{{- if .existingSecretUrlKey -}}
{{ include "chat-service.envFrom" (list "DATABASE_URL" .existingSecret .existingSecretUrlKey "") }}
{{- else -}}
{{ include "chat-service.envFrom" (list "DB_HOST" .existingSecret .existingSecretHostKey .host) }}
{{ include "chat-service.envFrom" (list "DB_PORT" .existingSecret .existingSecretPortKey .port) }}
{{ include "chat-service.envFrom" (list "DB_NAME" .existingSecret .existingSecretDatabaseKey .database) }}
{{ include "chat-service.envFrom" (list "DB_USER" .existingSecret .existingSecretUserKey .user) }}
{{ include "chat-service.envFrom" (list "DB_PASSWORD" .existingSecret .existingSecretPasswordKey "") }}
{{- end }}
{{- /* The driver reads libpq's variables, both with DB_* and as defaults for a URL. So sslmode does not require a URL, in which
the password would have to be escaped. */}}
- name: PGSSLMODE
  value: {{ .sslMode }}
{{- if .caSecret }}
- name: PGSSLROOTCERT
  value: /etc/chat-service/postgres-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* The CA certificate of an external Postgres: its mount and its volume. */}}
{{- define "chat-service.postgresCa" -}}
{{- if and (not .Values.postgres.enabled) .Values.externalPostgres.caSecret }}true{{ end }}
{{- end }}
{{- define "chat-service.postgresCaMount" -}}
- name: postgres-ca
  mountPath: /etc/chat-service/postgres-ca
  readOnly: true
{{- end }}
{{- define "chat-service.postgresCaVolume" -}}
- name: postgres-ca
  secret:
    secretName: {{ .Values.externalPostgres.caSecret }}
    items:
      - key: {{ .Values.externalPostgres.caSecretKey }}
        path: ca.crt
{{- end }}

{{- define "chat-service.redisEnv" -}}
{{- if .Values.redis.enabled -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      {{- include "chat-service.redisPassword" . | nindent 6 }}
{{- /* The kubelet substitutes the password. That works only for a variable defined earlier in the list. */}}
- name: REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "chat-service.partName" (list $ "redis") }}:6379/0
{{- else -}}
{{- with .Values.externalRedis -}}
{{- $authority := "" }}
{{- if and .existingSecret .existingSecretPasswordKey (or .masterUrl (not .existingSecretUrlKey)) }}
{{- $authority = ":$(REDIS_PASSWORD)@" -}}
{{ include "chat-service.envFrom" (list "REDIS_PASSWORD" .existingSecret .existingSecretPasswordKey "") }}
{{ end -}}
{{- if and .existingSecretSentinelPasswordKey (not .existingSecretUrlKey) -}}
{{ include "chat-service.envFrom" (list "REDIS_SENTINEL_PASSWORD" .existingSecret .existingSecretSentinelPasswordKey "") }}
{{ end -}}
{{- if .existingSecretUrlKey -}}
{{ include "chat-service.envFrom" (list "REDIS_URL" .existingSecret .existingSecretUrlKey "") }}
{{- else -}}
- name: REDIS_URL
{{- if .urls }}
  value: {{ join "," .urls | quote }}
{{- else }}
  value: {{ printf "%s://%s%s:%d/%d" (ternary "rediss" "redis" .tls) $authority .host (int .port) (int .database) | quote }}
{{- end }}
{{- end }}
- name: REDIS_MODE
  value: {{ .mode }}
{{- if eq .mode "sentinel" }}
- name: REDIS_SENTINEL_MASTER
  value: {{ .sentinelMaster | quote }}
{{- if or .masterUrl .existingSecretMasterUrlKey }}
{{ include "chat-service.envFrom" (list "REDIS_MASTER_URL" .existingSecret .existingSecretMasterUrlKey .masterUrl) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Refuses values that contradict each other or are incomplete. */}}
{{- define "chat-service.guards" -}}
{{- if and .Values.ingress.enabled .Values.httpRoute.enabled }}
{{- fail "ingress.enabled and httpRoute.enabled exclude one another: disable one of them" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.podMonitor.enabled }}
{{- fail "serviceMonitor.enabled and podMonitor.enabled would count every metric twice: disable one of them" }}
{{- end }}
{{- with .Values.externalPostgres }}
{{- if $.Values.postgres.enabled }}
{{- if or .host .existingSecret }}
{{- fail "externalPostgres is set while postgres.enabled is true: set postgres.enabled=false, or remove externalPostgres" }}
{{- end }}
{{- else if not .existingSecret }}
{{- fail "postgres.enabled=false needs externalPostgres.existingSecret, the Secret with its password or URL" }}
{{- else if not (or .existingSecretUrlKey .host .existingSecretHostKey) }}
{{- fail "postgres.enabled=false needs externalPostgres.host, or existingSecretHostKey or existingSecretUrlKey (CloudNativePG: uri)" }}
{{- else if not (or .existingSecretUrlKey .existingSecretPasswordKey) }}
{{- fail "externalPostgres needs existingSecretPasswordKey or existingSecretUrlKey, the key in existingSecret" }}
{{- end }}
{{- end }}
{{- with .Values.externalRedis }}
{{- if $.Values.redis.enabled }}
{{- if or .host .urls .existingSecret }}
{{- fail "externalRedis is set while redis.enabled is true: set redis.enabled=false, or remove externalRedis" }}
{{- end }}
{{- else if and .existingSecretUrlKey (not .existingSecret) }}
{{- fail "externalRedis.existingSecretUrlKey needs externalRedis.existingSecret" }}
{{- else if not (or .existingSecretUrlKey .host .urls) }}
{{- fail "redis.enabled=false needs externalRedis.host, urls, or existingSecret with existingSecretUrlKey" }}
{{- else if and .host .urls }}
{{- fail "externalRedis.host and externalRedis.urls exclude one another: keep one" }}
{{- else if and (eq .mode "sentinel") (not (or .urls .existingSecretUrlKey)) }}
{{- fail "externalRedis.mode=sentinel needs the sentinels' addresses in externalRedis.urls" }}
{{- else if and (ne .mode "sentinel") (or .masterUrl .existingSecretMasterUrlKey .existingSecretSentinelPasswordKey) }}
{{- fail "externalRedis.masterUrl, existingSecretMasterUrlKey and existingSecretSentinelPasswordKey need externalRedis.mode=sentinel" }}
{{- else if and .masterUrl .existingSecretMasterUrlKey }}
{{- fail "externalRedis.masterUrl and externalRedis.existingSecretMasterUrlKey exclude one another: keep one" }}
{{- else if and (or .existingSecretMasterUrlKey .existingSecretSentinelPasswordKey) (not .existingSecret) }}
{{- fail "externalRedis.existingSecretMasterUrlKey and existingSecretSentinelPasswordKey need externalRedis.existingSecret" }}
{{- end }}
{{- end }}
{{- if .Values.terminationGracePeriodSeconds }}
{{- $needed := int (include "chat-service.terminationSeconds" .) }}
{{- if lt (int .Values.terminationGracePeriodSeconds) $needed }}
{{- fail (printf "terminationGracePeriodSeconds=%d would kill a pod during its graceful shutdown: set at least %d, the sum of preStopSeconds, the greater of config.SHUTDOWN_GRACE_SECONDS and config.STREAM_DRAIN_SECONDS, and 10 s" (int .Values.terminationGracePeriodSeconds) $needed) }}
{{- end }}
{{- end }}
{{- if .Values.postgres.enabled }}
{{- $replicas := int (ternary .Values.autoscaling.maxReplicas .Values.replicaCount .Values.autoscaling.enabled) }}
{{- $pool := int (.Values.config.DB_POOL_MAX | default 20) }}
{{- /* One replica more during a rollout, and ten connections for the migration, psql and Postgres's own reserve. */}}
{{- $wanted := add (mul (add $replicas 1) $pool) 10 }}
{{- $offered := int (.Values.postgres.parameters.max_connections | default 100) }}
{{- if gt $wanted $offered }}
{{- fail (printf "%d replicas with config.DB_POOL_MAX=%d may open %d connections, but postgres.parameters.max_connections is %d: raise it, or lower DB_POOL_MAX" $replicas $pool $wanted $offered) }}
{{- end }}
{{- end }}
{{- end }}
