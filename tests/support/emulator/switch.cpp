// Leaves one stack for another: what a caller expects to find again is saved on the first.
#if !defined(__x86_64__)
#error "the emulator changes stacks with x86-64 instructions"
#endif

asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.section .note.GNU-stack, "", @progbits
)");
