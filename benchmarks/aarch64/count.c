/* Plugin for qemu-user (TCG plugin API version 1): the number of guest instructions executed.
 *
 * Writes "guest instructions: N" to stderr when the guest ends. A block is counted when it is entered; the
 * few blocks that are left half-way make no difference that matters here.
 *
 *     cc -O2 -shared -fPIC -o count.so count.c
 *
 * qemu's Debian package has no header for plugins, so what is used of it is declared here.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t PluginId;
typedef struct qemu_plugin_tb Block;
enum { ADD_TO_COUNTER = 0 };

size_t qemu_plugin_tb_n_insns(const Block *block);
void qemu_plugin_register_vcpu_tb_trans_cb(PluginId id, void (*translated)(PluginId, Block *));
void qemu_plugin_register_vcpu_tb_exec_inline(Block *block, int operation, void *counter, uint64_t value);
void qemu_plugin_register_atexit_cb(PluginId id, void (*ended)(PluginId, void *), void *data);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t instructions;

static void translated(PluginId id, Block *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_TO_COUNTER, &instructions, qemu_plugin_tb_n_insns(block));
}

static void ended(PluginId id, void *data)
{
    (void)id;
    (void)data;
    fprintf(stderr, "guest instructions: %llu\n", (unsigned long long)instructions);
}

__attribute__((visibility("default"))) int
qemu_plugin_install(PluginId id, const void *info, int argc, char **argv)
{
    (void)info;
    (void)argc;
    (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
